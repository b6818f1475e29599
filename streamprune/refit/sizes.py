"""What the refit of a layer costs: memory and arithmetic, from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from streamprune.hardware.memory_plan import RefitNeeds
from streamprune.refit.least_squares import EFFECT_VALUES, PART_TOKENS, SWEEPS


@dataclass(frozen=True)
class RefitSizes:
    """The sizes that decide what the refit of a layer costs: K experts that stay, of I x H, top-k, and N tokens.

    `judging` of the tokens judge. `layer_flop` are the operations for a token in the original layer, `pruned_flop` in
    the pruned one. `itemsize` is the bytes of a value of the model.
    """

    kept: int
    inner: int
    hidden: int
    top_k: int
    tokens: int
    judging: int
    layer_flop: int
    itemsize: int

    @property
    def fitted(self) -> int:
        return self.tokens - self.judging

    @property
    def model_flop(self) -> int:
        """Operations in the model's dtype: the pruned layer twice, and the activations again in every sweep."""
        activations = 4 * self.hidden * self.inner * self.top_k
        return 2 * self.tokens * self.layer_flop + (SWEEPS * self.fitted + self.judging) * activations

    @property
    def exact_flop(self) -> int:
        """Operations in float32 and float64: Gram matrices, right sides, residuals, solutions, and the shares."""
        step = 2 * self.inner * self.hidden
        gram = 2 * self.inner**2
        fit = self.fitted * self.top_k * (gram + SWEEPS * 2 * step)
        solve = self.kept * (self.inner**3 // 3 + SWEEPS * 2 * self.inner**2 * self.hidden)
        judge = self.judging * self.top_k * (step + 2 * self.top_k * self.hidden)
        return fit + solve + judge

    @property
    def needs(self) -> RefitNeeds:
        """The memory of the refit, if in the worst case one expert gets all tokens."""
        each = self.inner * self.hidden
        token = self.hidden * (self.itemsize + 4) + 8 * self.top_k
        part = min(self.tokens, PART_TOKENS) * 8 * (self.inner + self.hidden)
        effects = 12 * min(EFFECT_VALUES, self.judging * self.top_k * self.hidden)
        work = 4 * self.kept * each + self.fitted * self.inner * self.itemsize + 24 * self.inner**2 + 32 * each
        return RefitNeeds(
            collected=self.tokens * token,
            tokens=self.tokens,
            factors=8 * self.kept * self.inner**2,
            work=work + max(part, effects),
            # The source's values and their bytes, and those of the layer before, which may still be written.
            encoded=3 * self.kept * each * max(2, self.itemsize),
        )
