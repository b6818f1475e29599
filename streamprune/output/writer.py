"""Writing the output: shard by shard into a staging folder, which is renamed to the output when it is complete."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry, encode_header, read_header, read_ranges
from streamprune.common_settings import OutputSettings
from streamprune.errors import CheckpointError, OutputError, VerifyError
from streamprune.files.durable import (
    kill_point,
    reading,
    stream_atomically,
    sync_file,
    sync_folder,
    write_atomically,
    writing,
)
from streamprune.files.page_cache import Stretch, cache_unchanged, drop_files_from_cache
from streamprune.formats.base import KeptExperts
from streamprune.output.plan import REPORT_NAME, PrunePlan, ShardPlan
from streamprune.output.source_bytes import source_bytes, stretches
from streamprune.output.tensors import ComputedTensors, StageTensor, origins_of
from streamprune.output.verify import Proof, prove_tensors
from streamprune.work.folder import REPLACED_NAME, WorkFolder
from streamprune.work.layer_records import Computed, FinishedLayer, FinishedShard


def check_output(output: Path, source: Path, overwrite: bool, mark: str = CONFIG_NAME, what: str = "model") -> None:
    """Raise OutputError unless `output` may be created (or replaced, with `overwrite`).

    Only a folder with the file `mark`, which shows that it has what is to be replaced, is replaced.
    """
    if output.name in {"", ".."}:
        raise OutputError(f"{output} cannot be the output: it must be a named folder. Choose another with -o.")
    if os.path.ismount(output):
        raise OutputError(f"{output} is a mount point, which cannot be created in one step. Use -o {output / 'model'}.")
    target, origin = output.resolve(), source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise OutputError(f"The output {output} and the model {source} must not be, or contain, one another.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is not a folder. Choose another place with -o.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{output} exists and is not empty. Choose another place with -o, or add --overwrite.")
    if not (output / mark).exists():
        raise OutputError(f"{output} has no {what} (no {mark}), so --overwrite does not replace it. Choose another -o.")


def put_back(folder: Path, output: Path) -> None:
    """Move an old output in `folder` back to `output`, if the new one was never moved there."""
    if (folder / REPLACED_NAME).exists() and not output.exists():
        with writing(f"Moving {folder / REPLACED_NAME} back to {output}", output.parent):
            (folder / REPLACED_NAME).rename(output)


def check_place(settings: OutputSettings) -> None:
    """Put back an output that a killed run moved aside. Raises OutputError if no rename could complete the output."""
    output, work = settings.output, settings.output_work_folder
    with writing(f"Looking at {output}", output):
        put_back(work, output)
        parent = output.absolute().parent
        if os.path.ismount(work) or work.stat().st_dev != parent.stat().st_dev:
            raise OutputError(
                f"{work} is on another disk than {parent}, so the finished output could not be renamed from there. "
                "Remove it, and give the work folder with --work-dir."
            )


class OutputWriter:
    """Writes a pruned checkpoint into the work folder, and in `finish` renames it to the output.

    Needs a few MiB of memory, for any sizes of tensors and shards. Raises OutputError.
    """

    def __init__(self, plan: PrunePlan, checkpoint: Checkpoint, settings: OutputSettings, work: WorkFolder) -> None:
        self.plan = plan
        self._checkpoint, self._work, self._staging = checkpoint, work, work.staging
        self._output, self._overwrite, self._verify_layers = settings.output, settings.overwrite, settings.verify
        # Always on the output's disk, even with --work-dir on another.
        self._output_work = settings.output_work_folder
        #: By layer: the kept experts that were verified, and the proof.
        self._proofs: dict[int | None, tuple[KeptExperts, Proof]] = {}
        check_place(settings)
        # After check_place, which may have moved an old output back.
        check_output(self._output, self._checkpoint.folder, self._overwrite)

    def write_layer(
        self, layer: int | None, kept: KeptExperts, computed: Mapping[str, StageTensor] | None = None
    ) -> list[FinishedShard]:
        """Write the shards of a layer (None: of everything outside the layers), of whose experts `kept` stays.

        `computed` are the tensors that a stage has computed, by name; all others are copied from the source. With
        `settings.verify` the shards are then read back from the disk and verified. The page cache is left as it was.
        """
        computed = computed or {}
        origins = origins_of(computed)
        plans = [shard for shard in self.plan.shards if shard.layer == layer]
        files = [self._staging / shard.file for shard in plans]
        sources: dict[Path, list[Stretch]] = defaultdict(list)
        for tensor in (tensor for shard in plans for tensor in shard.tensors if tensor.name not in origins):
            for file, begin, end in stretches(tensor, kept):
                sources[self._checkpoint.folder / file].append((begin, end - begin))
        with cache_unchanged(sources):
            with writing(f"Writing to {self._staging}", self._staging):
                shards = [self._write_shard(shard, kept, computed) for shard in plans]
            complete = {path: [(0, shard.nbytes)] for path, shard in zip(files, shards, strict=True)}
            drop_files_from_cache(complete)
            if self._verify_layers:
                self._proofs[layer] = kept, self._prove(plans, {} if layer is None else {layer: kept}, origins)
                drop_files_from_cache(complete)
        return shards

    def read_computed(self, layer: int, record: FinishedLayer) -> ComputedTensors:
        """The computed tensors of a written layer, read from its shards. Raises VerifyError if they were changed."""
        plans = [shard for shard in self.plan.shards if shard.layer == layer]
        encoded = {each.name for shard in plans for each in shard.tensors if each.encoded is not None}
        entries, plain, parts = self.headers(plans), dict[str, StageTensor](), dict[str, StageTensor]()
        for name, origin in record.computed.items():
            entry = entries[name]
            with reading(self._staging / entry.file), (self._staging / entry.file).open("rb") as stream:
                tensor = StageTensor(origin.stage, b"".join(read_ranges(stream, [(entry.begin, entry.end)])))
            if tensor.origin != origin:
                raise VerifyError(f"{self._staging / entry.file}: {name} has changed since it was written.")
            (parts if name in encoded else plain)[name] = tensor
        return ComputedTensors(plain, parts)

    def _prove(
        self, plans: Sequence[ShardPlan], kept: Mapping[int, KeptExperts], computed: Mapping[str, Computed]
    ) -> Proof:
        tensors = [tensor for shard in plans for tensor in shard.tensors]
        source = self._checkpoint.folder
        return prove_tensors(tensors, kept, computed, source, self._staging, self.headers(plans))

    def has_written(self, layer: int | None, kept: KeptExperts, record: FinishedLayer) -> bool:
        """Whether the recorded shards are those of a layer of whose experts `kept` stays, and intact on the disk."""
        sizes = {shard.file: _file_bytes(shard) for shard in self.plan.shards if shard.layer == layer}
        same = {shard.file: shard.nbytes for shard in record.shards} == sizes and record.is_of(kept)
        return same and all(map(self._work.is_intact, record.shards))

    def _write_shard(self, shard: ShardPlan, kept: KeptExperts, computed: Mapping[str, StageTensor]) -> FinishedShard:
        header = _encode_header(shard)

        def portions() -> Iterator[bytes | memoryview]:
            yield header
            for tensor in shard.tensors:
                if tensor.name in computed:
                    data = computed[tensor.name].data
                    assert len(data) == tensor.nbytes
                    yield data
                    continue
                for portion in source_bytes(tensor, kept, self._checkpoint.folder):
                    kill_point("portion of a shard")
                    yield portion

        checksum = stream_atomically(self._staging / shard.file, portions())
        return FinishedShard(shard.file, len(header) + shard.nbytes, checksum)

    def headers(self, plans: Sequence[ShardPlan] | None = None) -> dict[str, TensorEntry]:
        """Every tensor in the files (of these shards, or of all) that are written so far, read from their headers."""
        plans = self.plan.shards if plans is None else plans
        files = [shard.file for shard in plans if (self._staging / shard.file).is_file()]
        try:
            return {entry.name: entry for file in files for entry in read_header(self._staging, file)}
        except (OSError, CheckpointError) as error:
            # CheckpointError advises downloading again, which would not help here.
            raise VerifyError(
                f"The files written to {self._staging} cannot be read: {error} Check the disk; `streamprune resume` "
                "writes damaged files again."
            ) from error

    def _recorded_origins(self) -> dict[str, Computed]:
        """The origins of all computed tensors, from the records of the layers in the work folder."""
        records = map(self._work.read_layer, dict.fromkeys(shard.layer for shard in self.plan.shards))
        return {name: origin for record in records if record is not None for name, origin in record.computed.items()}

    def verify(self, kept: Mapping[int, KeptExperts]) -> Proof:
        """Verify the written shards byte by byte, with what stays of each layer's experts.

        Computed tensors are compared with their hashes on record in the work folder. Layers that this writer has
        verified already are not read again.
        """
        proven = self._proven(kept)
        unproven = [shard for shard in self.plan.shards if shard.layer not in proven]
        rest = self._prove(unproven, kept, self._recorded_origins())
        return sum(proven.values(), rest)

    def has_proven(self, kept: Mapping[int, KeptExperts]) -> bool:
        """Whether `verify` has nothing left to read."""
        return {shard.layer for shard in self.plan.shards} <= self._proven(kept).keys()

    def _proven(self, kept: Mapping[int, KeptExperts]) -> dict[int | None, Proof]:
        return {
            layer: proof
            for layer, (experts, proof) in self._proofs.items()
            if experts == (kept.get(layer, KeptExperts()) if layer is not None else KeptExperts())
        }

    def finish(self, kept: Mapping[int, KeptExperts], report: dict[str, Any], card: str) -> None:
        """Write index, config, report, card and the source's small files, then rename the folder to the output.

        The origins of computed tensors are added to the report.
        """
        with writing(f"Completing {self._output}", self._output):
            self._write_small_files(kept, report, card)
            self._check_sizes()
            for folder in {path.parent for path in self._staging.rglob("*")}:
                sync_folder(folder)
            kill_point("all written")
            # Hours may have passed: do not replace an output that was created meanwhile.
            check_output(self._output, self._checkpoint.folder, self._overwrite)
            complete = self._on_the_outputs_disk()
            self._work.record_complete(complete)
            if self._output.is_dir() and any(self._output.iterdir()):
                # Moved aside first, so that it stays intact; after a crash here the next run moves it back.
                replaced = self._output_work / REPLACED_NAME
                shutil.rmtree(replaced, ignore_errors=True)
                self._output.rename(replaced)
                kill_point("old output moved aside")
            complete.rename(self._output)
            kill_point("output renamed")
            sync_folder(self._output.absolute().parent)

    def _on_the_outputs_disk(self) -> Path:
        """The finished folder on the output's disk: the staging folder, or its copy if that is on another disk."""
        copy = self._output_work / "model"
        if copy.exists() and copy.samefile(self._staging):
            return self._staging
        shutil.rmtree(copy, ignore_errors=True)
        if _can_rename(self._staging.parent, self._output_work):
            return self._staging
        shutil.copytree(self._staging, copy)
        for path in copy.rglob("*"):
            if path.is_file() and not filecmp.cmp(path, self._staging / path.relative_to(copy), shallow=False):
                raise OutputError(
                    f"{path} differs from the file that was copied there. Check the disk; finished work is kept."
                )
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(copy)
        return copy

    def _write_small_files(self, kept: Mapping[int, KeptExperts], report: dict[str, Any], card: str) -> None:
        weight_map = {tensor.name: shard.file for shard in self.plan.shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": self.plan.output_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        own = self.plan.files_for(kept)
        for relative in self.plan.copied:
            if relative.as_posix() in own:
                continue
            target = self._staging / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            stream_atomically(target, _read_source(self._checkpoint.folder / relative))
        config = self.plan.config_for(kept)
        computed = self._recorded_origins()
        full = {**report, "computed": msgspec.to_builtins(computed)} if computed else report
        values = {INDEX_NAME: index, CONFIG_NAME: dict(config), REPORT_NAME: full}
        texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in values.items()}
        files = {name: text.encode() for name, text in (texts | {"README.md": card}).items()}
        for name, contents in {**files, **own}.items():
            write_atomically(self._staging / name, contents)

    def _check_sizes(self) -> None:
        for shard in self.plan.shards:
            size = (self._staging / shard.file).stat().st_size
            expected = _file_bytes(shard)
            if size != expected:
                raise OutputError(
                    f"{shard.file} has {size:,} bytes instead of {expected:,}. Run the same command again, "
                    "which writes it again."
                )


def _read_source(path: Path) -> Iterator[memoryview]:
    """The bytes of a file of the model. Raises CheckpointError."""
    with reading(path), path.open("rb") as source:
        yield from read_ranges(source, [(0, os.fstat(source.fileno()).st_size)])


def _can_rename(source: Path, target: Path) -> bool:
    """Whether a rename works from one folder to the other; between two mounts of one device it does not."""
    probe, moved = source / "probe", target / "probe"
    probe.touch()
    try:
        probe.rename(moved)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
        moved.unlink(missing_ok=True)
    return True


def _encode_header(shard: ShardPlan) -> bytes:
    """The safetensors header of a shard."""
    tensors = ((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors)
    return encode_header({"format": "pt"}, tensors)


def _file_bytes(shard: ShardPlan) -> int:
    return len(_encode_header(shard)) + shard.nbytes
