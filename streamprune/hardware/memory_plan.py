"""Where hidden states are kept and how much is computed at a time, so that a run fits. Pure decisions from numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamprune.errors import ResourceError
from streamprune.hardware.memory import format_bytes, resident_bytes

#: Micro-batches that the host submits to a GPU before it waits for an earlier one: enough to keep the GPU busy, and few
#: enough that progress lines and a request to stop are close to what is finished.
MOST_SUBMITTED = 2
#: Page-locked memory through which weights are read to a GPU.
STAGING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Needs:
    """What a run needs, in bytes.

    `layer` is the largest layer's weights (with the copy that --propagate pruned makes), `reading` those of the largest
    as they are read, `loading` its peak while it is made from them, `staging` what passes through host memory on the
    way to a GPU, `non_layer` the embeddings and norms outside the layers. `workspace` gives the intermediate
    results for a number of tokens at a time. The calibration has `tokens` in `sequences` of up to `longest`; `states`
    are those of all of them, divided among `processes`. `itemsize` is the bytes of a computed value; with `sides` 2,
    some micro-batches have the states of two models.
    """

    layer: int
    reading: int
    loading: int
    staging: int
    non_layer: int
    states: int
    workspace: Callable[[int], int]
    sequences: int
    longest: int
    tokens: int
    itemsize: int
    sides: int = 1
    processes: int = 1

    def states_here(self, batch_tokens: int) -> int:
        """Bytes of one process's share of the hidden states, with micro-batches of so many tokens."""
        batches = max(1, -(-self.tokens // max(batch_tokens, self.longest)))
        return self.states * -(-batches // self.processes) // batches


@dataclass(frozen=True)
class Limit:
    """Bytes that may still be taken of something, the end of a sentence that says so ("only 3 GiB are free"), and what
    the user can do for more.
    """

    nbytes: int
    words: str
    remedy: str


@dataclass(frozen=True)
class Room:
    """What may be taken: `device` of the memory that computes, `host` of RAM beside it (None: they are one), `disk`."""

    device: Limit
    host: Limit | None
    disk: Limit


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided: where the hidden states lie ("device", "ram" or "disk"), and tokens per micro-batch at most.

    `ahead`: there is room to read a layer while the one before it is computed.
    """

    place: str
    batch_tokens: int
    needs: Needs
    room: Room
    device: str
    ahead: bool = False

    @property
    def tokens_at_a_time(self) -> int:
        """Tokens of the largest micro-batch."""
        return _tokens_at_a_time(self.needs, self.batch_tokens)

    @property
    def workspace(self) -> int:
        """Bytes of a micro-batch's intermediate results, at least for one sequence."""
        return self.needs.workspace(self.tokens_at_a_time)

    def describe(self) -> str:
        """One line for the user: what the run will need, of what there is."""
        needs, room = self.needs, self.room
        place = {"device": f"on {self.device}", "ram": "in RAM", "disk": "on disk"}[self.place]
        tokens = _tokens_at_a_time(needs, self.batch_tokens)
        on_device = _on_device(needs, room, self.place, tokens, self.ahead)
        totals = [f"{format_bytes(on_device)} of {format_bytes(room.device.nbytes)}"]
        if room.host is not None:
            totals[0] += f" on {self.device}"
            totals.append(
                f"{format_bytes(_on_host(needs, self.place, tokens))} of {format_bytes(room.host.nbytes)} in RAM"
            )
        ahead = f", the next one read ahead {format_bytes(needs.reading)}" if self.ahead else ""
        each = f"in each of {needs.processes} processes " if needs.processes > 1 else ""
        return (
            f"memory for the run: largest layer {format_bytes(needs.layer)} ({format_bytes(needs.loading)} while it is "
            f"loaded){ahead}, embeddings {format_bytes(needs.non_layer)}, "
            f"hidden states {format_bytes(needs.states_here(tokens))} {place}, "
            f"workspace {format_bytes(self.workspace)} for {tokens:,} tokens at a time; "
            f"{each}at most {' and '.join(totals)}, beside Python and the libraries with their caches "
            f"({format_bytes(resident_bytes())} by now)"
        )


def choose(needs: Needs, room: Room, states: str, most_tokens: int, usual_tokens: int) -> tuple[str, int]:
    """The place of the hidden states and the tokens per micro-batch (at most `most_tokens`).

    `states` is "auto", "device", "ram" or "disk"; auto takes the first place where they leave room for micro-batches of
    `usual_tokens`, or failing that of one sequence. Raises ResourceError when nothing fits.
    """
    places = [states] if states != "auto" else ["device", "ram", "disk"]
    if room.host is None:
        places = list(dict.fromkeys("ram" if place == "device" else place for place in places))
    for tokens in (min(usual_tokens, most_tokens), 1):
        for place in places:
            if _problem(needs, room, place, _tokens_at_a_time(needs, tokens)) is None:
                return place, _largest_batch(needs, room, place, most_tokens)
    problems = [_problem(needs, room, place, _tokens_at_a_time(needs, 1)) for place in places]
    raise ResourceError(str(problems[-1]))


def can_read_ahead(needs: Needs, room: Room, place: str, batch_tokens: int) -> bool:
    """Whether the next layer's weights also fit."""
    return _on_device(needs, room, place, _tokens_at_a_time(needs, batch_tokens), ahead=True) <= room.device.nbytes


def _largest_batch(needs: Needs, room: Room, place: str, most_tokens: int) -> int:
    """The most tokens whose workspace fits, in whole sequences, if not `most_tokens` themselves."""
    low, high = 1, max(1, min(needs.sequences, most_tokens // needs.longest))
    if _problem(needs, room, place, high * needs.longest) is None:
        return most_tokens
    while high - low > 1:
        middle = (low + high) // 2
        if _problem(needs, room, place, middle * needs.longest) is None:
            low = middle
        else:
            high = middle
    return low * needs.longest


def _tokens_at_a_time(needs: Needs, batch_tokens: int) -> int:
    """Tokens of the largest micro-batch: whole sequences, at least one and not more than there are."""
    return max(1, min(needs.sequences, batch_tokens // needs.longest)) * needs.longest


def _on_device(needs: Needs, room: Room, place: str, tokens: int, ahead: bool = False) -> int:
    if place == "device" or (place == "ram" and room.host is None):
        states = needs.states_here(tokens)
    else:
        # On a GPU, the micro-batches that were submitted have theirs there too, before and after them.
        states = _moving(needs, tokens) * (1 if room.host is None else 1 + MOST_SUBMITTED)
    working = needs.layer + needs.workspace(tokens) + (needs.reading if ahead else 0)
    return needs.non_layer + states + max(needs.loading, working)


def _on_host(needs: Needs, place: str, tokens: int) -> int:
    """RAM beside a GPU: the states if they are there, and what passes through on the way to it."""
    if place == "ram":
        one = _moving(needs, tokens) // 2
        # torch takes page-locked memory in powers of two.
        return needs.staging + needs.states_here(tokens) * (1 << max(0, one - 1).bit_length()) // max(1, one)
    return needs.staging + (_moving(needs, tokens) if place == "disk" else 0)


def _moving(needs: Needs, tokens: int) -> int:
    """The states of the micro-batches that are on their way while one computes: one comes, one goes."""
    return 2 * needs.sides * (-(-needs.states * tokens // max(1, needs.tokens)))


def _problem(needs: Needs, room: Room, place: str, tokens: int) -> str | None:
    """Why the run cannot be with the states in this place and so many tokens at a time; None if it can."""
    # (On a disk all processes may write to the same one.)
    share = f"one of {needs.processes} shares: " if needs.processes > 1 and place != "disk" else ""
    here = format_bytes(needs.states if place == "disk" else needs.states_here(tokens))
    of_tokens = f"the hidden states of {needs.tokens:,} calibration tokens ({share}{here})"
    if place == "disk" and needs.states > room.disk.nbytes:
        return (
            f"{of_tokens[0].upper()}{of_tokens[1:]} do not fit on the disk: {room.disk.words}. You can free "
            f"{format_bytes(needs.states - room.disk.nbytes)}, {room.disk.remedy}."
        )
    if room.host is not None and _on_host(needs, place, tokens) > room.host.nbytes:
        what = f"Loading a layer ({format_bytes(needs.staging)})"
        if place == "ram":
            what, remedy = f"{what} and {of_tokens}", "Use --states disk, fewer --samples, or a shorter --seq-len."
        elif place == "disk":
            what = f"{what} and hidden states on their way to the disk ({format_bytes(_moving(needs, tokens))})"
            remedy = f"Use a shorter --seq-len, or {room.host.remedy}."
        else:
            remedy = f"You can {room.host.remedy}."
        needed = format_bytes(_on_host(needs, place, tokens))
        return f"{what} need {needed} of memory, but {room.host.words}. {remedy}"
    total = _on_device(needs, room, place, tokens)
    if total <= room.device.nbytes:
        return None
    parts = [
        f"The largest layer ({format_bytes(needs.layer)}, and up to {format_bytes(needs.loading)} while it is loaded)",
        f"the embeddings and norms ({format_bytes(needs.non_layer)})",
        f"a workspace for {tokens:,} tokens at a time ({format_bytes(needs.workspace(tokens))})",
    ]
    in_the_way = place == "device" or (place == "ram" and room.host is None)
    parts += [of_tokens] if in_the_way else []
    return (
        f"{', '.join(parts[:-1])} and {parts[-1]} need {format_bytes(total)} of memory together, but "
        f"{room.device.words}. {_remedy(needs, room, in_the_way)}"
    )


def _remedy(needs: Needs, room: Room, states_in_the_way: bool) -> str:
    least = needs.non_layer + max(needs.loading, needs.layer)
    if least > room.device.nbytes:
        return f"Even without hidden states and workspace it would not fit. You can {room.device.remedy}."
    if states_in_the_way:
        others = "--states disk" if room.host is None else "--states ram or disk"
        return f"Use {others}, fewer --samples, or a shorter --seq-len."
    return f"One sequence is the least at a time. You can use a shorter --seq-len, or {room.device.remedy}."
