"""What attention layers can do in a step: the legal states, as enumerations."""

from enum import Enum


class AttentionMode(Enum):
    """What every attention layer of one kind does in a step."""

    COMPUTE = "compute"
    STORE = "compute, store"
    STORE_MEAN = "compute, store the mean of the halves"
    STORE_HALF = "compute, store the half that goes on"
    REUSE = "reuse"

    @property
    def stores(self) -> bool:
        """Whether the output is kept."""
        return self not in (AttentionMode.COMPUTE, AttentionMode.REUSE)


# Modes that store half of a batch, or as much.
HALVING = (AttentionMode.STORE_MEAN, AttentionMode.STORE_HALF)


class Phase(Enum):
    UNGUIDED = "before guidance"
    PLANNING = "semantics-planning"
    FIDELITY = "fidelity-improving"

    @property
    def has_one_branch(self) -> bool:
        """Whether one branch of guidance is denoised, where there are two."""
        return self is not Phase.PLANNING


class StepMode(Enum):
    """The legal states of a step: its phase, the mode of cross-attention, the mode of self-attention.

    `UNGUIDED` is a step before guidance begins. `CLOSING` is the last step of the planning phase. With classifier-free
    guidance it stores the mean of the two halves of the batch, since one branch goes on; without guidance
    (`CLOSING_UNGUIDED`) it stores what it has. Where the run looks at its text again, each look is such a step, and
    stores the half that goes on (`LOOKING`).
    """

    UNGUIDED = Phase.UNGUIDED, AttentionMode.COMPUTE, AttentionMode.COMPUTE
    PLANNING = Phase.PLANNING, AttentionMode.COMPUTE, AttentionMode.COMPUTE
    PLANNING_STORE_SELF = Phase.PLANNING, AttentionMode.COMPUTE, AttentionMode.STORE
    PLANNING_REUSE_SELF = Phase.PLANNING, AttentionMode.COMPUTE, AttentionMode.REUSE
    CLOSING = Phase.PLANNING, AttentionMode.STORE_MEAN, AttentionMode.COMPUTE
    CLOSING_STORE_SELF = Phase.PLANNING, AttentionMode.STORE_MEAN, AttentionMode.STORE_MEAN
    CLOSING_UNGUIDED = Phase.PLANNING, AttentionMode.STORE, AttentionMode.COMPUTE
    CLOSING_UNGUIDED_STORE_SELF = Phase.PLANNING, AttentionMode.STORE, AttentionMode.STORE
    LOOKING = Phase.PLANNING, AttentionMode.STORE_HALF, AttentionMode.COMPUTE
    LOOKING_STORE_SELF = Phase.PLANNING, AttentionMode.STORE_HALF, AttentionMode.STORE_HALF
    FIDELITY = Phase.FIDELITY, AttentionMode.REUSE, AttentionMode.COMPUTE
    FIDELITY_STORE_SELF = Phase.FIDELITY, AttentionMode.REUSE, AttentionMode.STORE
    FIDELITY_REUSE_SELF = Phase.FIDELITY, AttentionMode.REUSE, AttentionMode.REUSE

    @property
    def phase(self) -> Phase:
        return self.value[0]

    @property
    def cross_attention(self) -> AttentionMode:
        return self.value[1]

    @property
    def self_attention(self) -> AttentionMode:
        return self.value[2]
