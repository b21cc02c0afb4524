"""The legal states of attention layers in a step, as enumerations."""

from enum import Enum


class AttentionMode(Enum):
    """What all cross-attention layers, or all self-attention layers, do in a step."""

    COMPUTE = "compute"
    STORE = "compute, store"
    STORE_MEAN = "compute, store the mean of the halves"
    STORE_HALF = "compute, store the half that goes on"
    REUSE = "reuse"

    @property
    def stores(self) -> bool:
        """Whether the output is kept."""
        return self not in (AttentionMode.COMPUTE, AttentionMode.REUSE)


# Modes that store half as many rows as the batch has.
HALVING = (AttentionMode.STORE_MEAN, AttentionMode.STORE_HALF)


class Phase(Enum):
    """Phase of a run."""

    UNGUIDED = "before guidance"
    PLANNING = "semantics-planning"
    FIDELITY = "fidelity-improving"

    @property
    def has_one_branch(self) -> bool:
        """Whether a run with guidance denoises only one of its two branches."""
        return self is not Phase.PLANNING


class StepMode(Enum):
    """State of a step: its phase, the mode of cross-attention, and the mode of self-attention.

    `UNGUIDED` is a step before guidance begins. `CLOSING` is the last step of the planning phase. With classifier-free
    guidance it stores the mean of the batch's two halves, since only one branch goes on. Without guidance
    (`CLOSING_UNGUIDED`) it stores the outputs as they are. In a run with looks, the last step of the planning phase
    and each look store the half that goes on (`LOOKING`).
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

    @property
    def only_computes(self) -> bool:
        """Whether no layer stores or reuses."""
        return self.cross_attention is self.self_attention is AttentionMode.COMPUTE
