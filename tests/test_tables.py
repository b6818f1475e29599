"""`Table` as terminal text, Markdown and HTML: columns are aligned, and no cell is more than a piece of text."""

from __future__ import annotations

from streamprune.tables import Struck, Table, code, interval, markdown, number, percent, plain


def test_a_table_in_all_three_forms() -> None:
    table = Table("Title", ("name", "tokens", "kind"), [("a", "1,000", "x"), ("long", "7")], ("a note",), align="lrl")
    assert table.text() == ["Title", "  name  tokens  kind", "  a      1,000  x", "  long       7", "  a note"]
    assert table.markdown() == [
        "| name | tokens | kind |", "|---|---:|---|", "| a | 1,000 | x |", "| long | 7 |  |"
    ]  # fmt: skip
    html = table.html()
    assert '<th scope="row" class="l">a<td>1,000<td class="l">x' in html
    assert html.startswith("<table><caption>Title</caption>")
    assert html.endswith("</table>\n<p>a note</p>")


def test_a_table_without_titles_or_rows() -> None:
    assert Table("", ("", ""), [("a", "1"), ("bb", "10")]).text(indent="") == ["a    1", "bb  10"]
    assert Table("Nothing", ("", ""), []).text() == ["Nothing"]
    assert Table("Nothing", ("a", "b"), []).markdown() == ["| a | b |", "|---|---:|"]


def test_cells_are_escaped() -> None:
    name = "<b>|`x`</b>"
    table = Table(name, (name,), [(name,), (Struck(name),)])
    assert "<b>" not in table.html()
    assert table.html().count("&lt;b&gt;|`x`&lt;/b&gt;") == 4
    escaped = r"&lt;b&gt;&#124;\`x\`&lt;/b&gt;"
    assert markdown(name) == escaped
    assert table.markdown() == [f"| {escaped} |", "|---|", f"| {escaped} |", f"| ~~{escaped}~~ |"]


def test_no_name_is_more_than_a_piece_of_text() -> None:
    assert plain("a\n## b\x1b[2J\u202e") == "a ## b?[2J?"
    assert len(plain("x" * 10_000)) == 300
    assert code("a|b") == "`a\\|b`"
    assert code("a`b") == "`` a`b ``"
    assert code("``") == "``` `` ```"
    assert code("") == "` `"
    assert markdown("<b>[x](http://y) *z*\x1b") == r"&lt;b&gt;\[x\](http\://y) \*z\*?"


def test_numbers() -> None:
    assert [number(value) for value in (None, 0.5, 12345.6, 1e12, 3)] == ["–", "0.5000", "12,346", "1.000e+12", "3.000"]
    assert percent(0.125) == "12.5%"
    assert interval((0.25, 0.5)) == "0.2500 to 0.5000"
    assert interval((0.25, 0.5), percent) == "25.0% to 50.0%"
    assert interval(None) == "–"
