"""Where hidden states are kept and how much is computed at a time, so that a run fits. Pure decisions from numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from streamprune.errors import ResourceError
from streamprune.hardware.memory import format_bytes, resident_bytes

#: Micro-batches that the host submits to a GPU before it waits for an earlier one: enough to keep the GPU busy, and few
#: enough that progress lines are current and a request to stop takes effect soon.
MOST_SUBMITTED = 2
#: Page-locked memory through which weights are read to a GPU.
STAGING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RefitNeeds:
    """What the refit of a layer needs, in bytes.

    `collected` is what it keeps of `tokens` tokens, divided among the processes, and `factors` are the factored
    matrices, which each process has all of. Both are where the hidden states are (in RAM if those are on disk). `work`
    is what the device has while it fits, `encoded` the new tensors in RAM, before they are written.
    """

    collected: int = 0
    tokens: int = 0
    factors: int = 0
    work: int = 0
    encoded: int = 0


@dataclass(frozen=True)
class RoundingNeeds:
    """What rounding the matrices of a layer needs, in bytes.

    `collected` is what it keeps of `tokens` tokens, as a refit does. On the device are `sums` over the inputs of Linear
    modules, `single` while one of these or of the experts is rounded, and `each` more for every other one of up to
    `experts` experts that are rounded together; `copy` is what the rounded layer takes on top of the pruned one.
    `encoded` are the new tensors in RAM, before they are written.
    """

    collected: int = 0
    tokens: int = 0
    sums: int = 0
    single: int = 0
    each: int = 0
    experts: int = 0
    copy: int = 0
    encoded: int = 0


@dataclass(frozen=True)
class Needs:
    """What a run needs, in bytes.

    `layer` is the largest layer's weights (with its pruned copy, if there is one), `reading` the largest layer's as
    stored in the checkpoint, `loading` the peak while a layer is converted, `staging` the host memory through which
    weights go to a GPU, `non_layer` the embeddings and norms outside the layers. `workspace` returns the intermediate
    results for a number of tokens at a time. The calibration has `tokens` in `sequences` of up to `longest`; `states`
    is the total of their hidden states, divided among `processes`. `itemsize` is the bytes of a computed value; with
    `sides` 2, some micro-batches have the states of two models (3: and their experts' output). `sums` are the scores of
    a layer's channels while they are summed up, `recorded` those of all layers, which stay in RAM.
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
    sums: int = 0
    recorded: int = 0
    refit: RefitNeeds = RefitNeeds()
    rounding: RoundingNeeds = RoundingNeeds()

    def states_here(self, batch_tokens: int) -> int:
        """Bytes of one process's share of the hidden states, with micro-batches of so many tokens."""
        batches = max(1, -(-self.tokens // max(batch_tokens, self.longest)))
        return self.states * -(-batches // self.processes) // batches

    def collected_here(self, batch_tokens: int) -> int:
        """Bytes of a refit, or of rounding after it, that one process has.

        That is if more of its share of the micro-batches takes part than of others.
        """
        size = max(batch_tokens, self.longest)
        own = -(-max(1, -(-self.tokens // size)) // self.processes) * size
        refit, rounding = (
            -(-each.collected * min(each.tokens, own) // each.tokens) if each.tokens else 0
            for each in (self.refit, self.rounding)
        )
        return max(self.refit.factors + refit, rounding)

    @property
    def encoded(self) -> int:
        """Bytes of computed tensors in RAM before they are written: those of the refit are rounded one by one."""
        return self.refit.encoded + self.rounding.encoded


@dataclass(frozen=True)
class Limit:
    """Bytes that are available, the end of a sentence that says so ("only 3 GiB are free"), and how the user can get
    more.
    """

    nbytes: int
    words: str
    remedy: str


@dataclass(frozen=True)
class Room:
    """The available memory: of the computing device, of RAM in addition to a GPU's (`host`; None on the CPU), and of
    the disk.
    """

    device: Limit
    host: Limit | None
    disk: Limit


@dataclass(frozen=True)
class MemoryPlan:
    """Where the hidden states are stored ("device", "ram" or "disk"), and the most tokens per micro-batch.

    `ahead`: there is memory to prefetch a layer while the one before is computed. `device` is the device's name.
    """

    place: str
    batch_tokens: int
    needs: Needs
    room: Room
    device: str
    ahead: bool = False

    @property
    def tokens_at_a_time(self) -> int:
        """Tokens of the largest micro-batch: complete sequences, at least one and at most all."""
        return max(1, min(self.needs.sequences, self.batch_tokens // self.needs.longest)) * self.needs.longest

    @property
    def workspace(self) -> int:
        """Bytes of a micro-batch's intermediate results."""
        return self.needs.workspace(self.tokens_at_a_time)

    @property
    def experts_at_a_time(self) -> int:
        """How many experts are rounded at a time: as many as an eighth of the memory is enough for, at least one."""
        rounding = self.needs.rounding
        more = (self.room.device.nbytes // 8 - rounding.single) // max(1, rounding.each)
        return max(1, min(rounding.experts, 1 + more))

    @property
    def device_bytes(self) -> int:
        """Most bytes that the run takes of the memory that computes."""
        needs = self.needs
        if self._states_on_device:
            states = self._states
        else:
            # On a GPU, the micro-batches that were submitted have theirs there too, before and after them.
            states = self._moving * (1 if self.room.host is None else 1 + MOST_SUBMITTED)
        stage = max(self.workspace, needs.refit.work, self._rounding_work)
        working = needs.layer + stage + (needs.reading if self.ahead else 0) + needs.sums
        if self._states_on_device:
            working += self._collected
        in_ram = needs.recorded + needs.encoded if self.room.host is None else 0
        return needs.non_layer + in_ram + states + max(needs.loading, working)

    @property
    def _host_bytes(self) -> int:
        """RAM next to a GPU: the states if they are there, and what passes through on the way to it."""
        if self.place == "ram":
            states = self._states * self._locked // max(1, self._moving // 2)
        else:
            states = self._passing if self.place == "disk" else 0
        collected = 0 if self._states_on_device else self._collected
        return self.needs.staging + self.needs.recorded + self.needs.encoded + collected + states

    @property
    def _rounding_work(self) -> int:
        """Bytes on the device while a layer is rounded, or after that, beside the collected tokens; 0 if none is."""
        rounding = self.needs.rounding
        if not rounding.copy:
            return 0
        experts = rounding.single + (self.experts_at_a_time - 1) * rounding.each
        return rounding.sums + rounding.copy + max(self.workspace, experts)

    @property
    def _states_on_device(self) -> bool:
        return self.place == "device" or (self.place == "ram" and self.room.host is None)

    @property
    def _states(self) -> int:
        return self.needs.states_here(self.tokens_at_a_time)

    @property
    def _collected(self) -> int:
        return self.needs.collected_here(self.tokens_at_a_time)

    @property
    def _locked(self) -> int:
        """The states of a micro-batch in page-locked memory, which torch takes in powers of two."""
        return 1 << max(0, self._moving // 2 - 1).bit_length()

    @property
    def _passing(self) -> int:
        """RAM for states between a GPU and the disk: one on its way in, one that is written, and one that waits."""
        return 3 * self._locked

    @property
    def _moving(self) -> int:
        """The states of the micro-batches that are moved while another computes: one in, one out."""
        needs = self.needs
        return 2 * needs.sides * (-(-needs.states * self.tokens_at_a_time // max(1, needs.tokens)))

    def describe(self) -> str:
        """One line for the user: the memory that the run needs, and the memory that is available."""
        needs, room = self.needs, self.room
        place = {"device": f"on {self.device}", "ram": "in RAM", "disk": "on disk"}[self.place]
        totals = f"{format_bytes(self.device_bytes)} of {format_bytes(room.device.nbytes)}"
        if room.host is not None:
            totals += (
                f" on {self.device} and {format_bytes(self._host_bytes)} of {format_bytes(room.host.nbytes)} in RAM"
            )
        ahead = f", the next one read ahead {format_bytes(needs.reading)}" if self.ahead else ""
        refit = ""
        if needs.refit.collected:
            where = place if self.place != "disk" else "in RAM"
            refit = f", refit {format_bytes(self._collected)} {where} and {format_bytes(needs.refit.work)} of workspace"
        if needs.rounding.each:
            refit += (
                f", rounding {format_bytes(self._rounding_work)} of workspace for {self.experts_at_a_time} experts at "
                "a time"
            )
        scores = f", scores of channels {format_bytes(needs.recorded)} in RAM" if needs.recorded else ""
        each = f"in each of {needs.processes} processes " if needs.processes > 1 else ""
        return (
            f"memory for the run: largest layer {format_bytes(needs.layer)} ({format_bytes(needs.loading)} while it is "
            f"loaded){ahead}, embeddings {format_bytes(needs.non_layer)}, "
            f"hidden states {format_bytes(self._states)} {place}, "
            f"workspace {format_bytes(self.workspace)} for {self.tokens_at_a_time:,} tokens at a time{scores}{refit}; "
            f"{each}at most {totals}, in addition to Python and the libraries with their caches "
            f"({format_bytes(resident_bytes())} by now)"
        )

    def problem(self) -> str | None:
        """Why the run does not fit with this plan, with numbers and a remedy; None if it fits."""
        needs, disk, host = self.needs, self.room.disk, self.room.host
        if self.place == "disk" and needs.states > disk.nbytes:
            # (All processes may write to the same disk.)
            states = f"The hidden states of {needs.tokens:,} calibration tokens ({format_bytes(needs.states)})"
            missing = format_bytes(needs.states - disk.nbytes)
            return f"{states} do not fit on the disk: {disk.words}. You can free {missing}, {disk.remedy}."
        if host is not None and self._host_bytes > host.nbytes:
            what, remedy = f"Loading a layer ({format_bytes(needs.staging)})", f"You can {host.remedy}."
            if needs.recorded:
                what += f", {self._recorded_text()}"
            if self.place == "ram":
                what += f" and {self._states_text()}"
                remedy = "Use --states disk, fewer --samples, or a shorter --seq-len."
            elif self.place == "disk":
                what += f" and hidden states on their way to the disk ({format_bytes(self._passing)})"
                remedy = f"Use a shorter --seq-len, or {host.remedy}."
            return f"{what} need {format_bytes(self._host_bytes)} of memory, but {host.words}. {remedy}"
        return self._problem_on_device() if self.device_bytes > self.room.device.nbytes else None

    def _problem_on_device(self) -> str:
        needs, limit = self.needs, self.room.device
        parts = [
            f"The largest layer ({format_bytes(needs.layer)}, and up to {format_bytes(needs.loading)} while it is "
            "loaded)",
            f"the embeddings and norms ({format_bytes(needs.non_layer)})",
            f"a workspace for {self.tokens_at_a_time:,} tokens at a time ({format_bytes(self.workspace)})",
            *([self._states_text()] if self._states_on_device else []),
            *([f"what rounding needs ({format_bytes(self._rounding_work)})"] if self._rounding_work else []),
            *([f"what a refit needs ({format_bytes(self._refit_on_device)})"] if self._refit_on_device else []),
            *([self._recorded_text()] if self.room.host is None and needs.recorded else []),
        ]
        if needs.non_layer + max(needs.loading, needs.layer) > limit.nbytes:
            remedy = f"Even without hidden states and workspace it would not fit. You can {limit.remedy}."
        elif self._states_on_device:
            others = "--states disk" if self.room.host is None else "--states ram or disk"
            remedy = f"Use {others}, fewer --samples, or a shorter --seq-len."
        else:
            remedy = f"At least one sequence is computed at a time. You can use a shorter --seq-len, or {limit.remedy}."
        return (
            f"{', '.join(parts[:-1])} and {parts[-1]} need {format_bytes(self.device_bytes)} of memory together, but "
            f"{limit.words}. {remedy}"
        )

    def _recorded_text(self) -> str:
        return f"the scores of channels ({format_bytes(self.needs.recorded)}; none with --no-channels)"

    @property
    def _refit_on_device(self) -> int:
        return self.needs.refit.work + (self._collected if self._states_on_device else 0)

    def _states_text(self) -> str:
        share = f"one of {self.needs.processes} shares: " if self.needs.processes > 1 else ""
        return f"the hidden states of {self.needs.tokens:,} calibration tokens ({share}{format_bytes(self._states)})"


def choose(
    needs: Needs, room: Room, states: str, most_tokens: int, usual_tokens: int, device: str = "cpu"
) -> MemoryPlan:
    """The plan with the largest micro-batches of at most `most_tokens`.

    `states` is "auto", "device", "ram" or "disk"; auto takes the first of these that leaves memory for micro-batches of
    `usual_tokens`, or else for one sequence. Raises ResourceError if nothing fits.
    """
    places = [states] if states != "auto" else ["device", "ram", "disk"]
    if room.host is None:
        places = list(dict.fromkeys("ram" if place == "device" else place for place in places))
    plans = [
        MemoryPlan(place, tokens, needs, room, device)
        for tokens in (min(usual_tokens, most_tokens), 1)
        for place in places
    ]
    plan = next((plan for plan in plans if plan.problem() is None), None)
    if plan is None:
        raise ResourceError(str(plans[-1].problem()))
    plan = _with_largest_batch(plan, most_tokens)
    ahead = replace(plan, ahead=True)
    return ahead if ahead.device_bytes <= room.device.nbytes else plan


def _with_largest_batch(plan: MemoryPlan, most_tokens: int) -> MemoryPlan:
    """The plan with the most tokens that fit: `most_tokens`, or as many complete sequences as fit."""

    def exceeds(sequences: int) -> bool:
        return replace(plan, batch_tokens=sequences * plan.needs.longest).problem() is not None

    counts = range(1, max(1, min(plan.needs.sequences, most_tokens // plan.needs.longest)) + 1)
    if not exceeds(counts[-1]):
        return replace(plan, batch_tokens=most_tokens)
    # One sequence is known to fit.
    fitting = counts[bisect_left(counts, True, lo=1, key=exceeds) - 1]
    return replace(plan, batch_tokens=fitting * plan.needs.longest)
