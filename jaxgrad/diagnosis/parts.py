"""What a loss can be built of."""

from dataclasses import dataclass, field

from jaxgrad.graph.ir import Op, Ref, Value

BOUNDED = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}


@dataclass(frozen=True, eq=False)
class Activation:
    """A nonlinearity between layers; `gate` if its output multiplies other data."""

    op: Op
    kind: str
    source: Value
    output: Value
    where: str
    gate: bool = False
    affine: tuple["Affine", ...] = ()


@dataclass(frozen=True, eq=False)
class Affine:
    """A product with a weight; `normalized` if a norm stands between it and the activation."""

    op: Op
    leaf: str
    fan_in: int
    fan_out: int
    where: str
    recurrent: bool = False


@dataclass(frozen=True, eq=False)
class Softmax:
    """Exponentials divided by their sum: `kind` is "log" where only its logarithm is used."""

    source: Value
    output: Value | None
    axis: int
    size: int
    kind: str
    head: bool
    where: str
    scores: Value = -1  # the source before masks


@dataclass(frozen=True, eq=False)
class Norm:
    """A division by a root mean square. `post` if it alone reads a residual sum."""

    op: Op
    source: Value
    axes: tuple[int, ...]
    count: int
    where: str
    over_batch: bool
    after_sum: bool = False
    post: bool = False
    copies: int = 1


@dataclass(frozen=True, eq=False)
class Difference:
    """A prediction minus a target, at the end of a regression."""

    op: Op
    prediction: Value
    target: Ref
    where: str


@dataclass(frozen=True, eq=False)
class LogHead:
    """A logarithm, or a log-sigmoid, of what the last layer returns.

    `bare` is the source before it is clipped: what a clip to (eps, 1 - eps) hides.
    """

    op: Op
    source: Value
    kind: str  # "log" or "log_sigmoid"
    where: str
    bare: Value


@dataclass(frozen=True, eq=False)
class Binary:
    """A target that weighs the logarithm of a probability: `where` is that of the logits."""

    op: Op
    logits: Value
    target: Value
    where: str


@dataclass(frozen=True, eq=False)
class Index:
    """Integers of the data that pick among classes or rows; `picked` is what they pick."""

    value: Value
    size: int
    via: str  # "gather" or "one_hot"
    head: bool
    where: str
    picked: Value


@dataclass(frozen=True, eq=False)
class Mask:
    """A random mask on activations; `keeps` says what its predicate means."""

    predicate: Value
    keeps: bool
    where: str


@dataclass(frozen=True, eq=False)
class Structure:
    """All that was read."""

    activations: list[Activation] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    log_heads: list[LogHead] = field(default_factory=list)
    binaries: list[Binary] = field(default_factory=list)
    indices: list[Index] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    penalties: list[Value] = field(default_factory=list)
    residual_sums: list[Value] = field(default_factory=list)

    @property
    def outputs(self) -> list[Value]:
        """What the model returns: logits, predictions, what a log-sigmoid is taken of."""
        found = [d.prediction for d in self.differences]
        found += [h.source for h in self.log_heads]
        return found + [s.source for s in self.softmaxes if s.head]

    @property
    def attention(self) -> list[Softmax]:
        """The softmaxes that are no heads."""
        return [s for s in self.softmaxes if not s.head]

    @property
    def depth(self) -> int:
        """Number of hidden activations."""
        return len([a for a in self.activations if not a.gate])
