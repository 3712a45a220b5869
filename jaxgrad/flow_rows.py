"""What the taps recorded, as the rows of a table: one an iteration, in forward order.

Where nested loops run a layer very often, the iterations of whole loops share a row
(`jaxgrad.graph.site`): its statistics are those of all their tensors taken together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgrad import statistics
from jaxgrad.graph.site import Rows, Site, plan_rows, summaries


@dataclass(frozen=True)
class Table:
    """The rows of a program's sites.

    Attributes:
        sites: the sites.
        rows: the rows that they give.
    """

    sites: tuple[Site, ...]
    rows: Rows

    @staticmethod
    def of(sites: Sequence[Site]) -> "Table":
        """The table of the rows that sites give."""
        return Table(tuple(sites), plan_rows(sites))

    @property
    def summarized(self) -> tuple[str, ...]:
        """A sentence for every layer some of whose iterations share a row."""
        return summaries(self.sites, self.rows)

    @property
    def parameters(self) -> tuple[tuple[str, ...], ...]:
        """For each row the parameter leaves of its layer."""
        return tuple(self.sites[i].parameters for i in self.rows.site)

    def sums(
        self, records: dict[int, Array], names: tuple[str, ...], runs: Array | None = None
    ) -> tuple[statistics.Sums, Array, Array]:
        """The rows' sums, and how often each row's tensor was measured.

        Args:
            records: number of the site -> what its tap returned, with an axis a loop.
            names: the attributes of `statistics.Sums` that were summed.
            runs: of how many tensors a row consists, if that is known; else as many as were
                measured.

        Returns:
            The sums, whether each row was measured, and of how many tensors it consists.
        """
        parts, counts = [], []
        for i, site in enumerate(self.sites):
            table, count = _together(records[i], site, self.rows.shared[i], names)
            parts.append(table)
            counts.append(count)
        dtype = jnp.result_type(*parts) if parts else jnp.float32
        empty = jnp.zeros((0, 1 + len(names)))
        table = jnp.concatenate([p.astype(dtype) for p in parts]) if parts else empty
        sizes: Any = np.array([np.prod(self.sites[i].shape) for i in self.rows.site], float)
        ordered = self._ordered(table)
        found = runs
        if any(self.rows.shared):
            found = self._ordered(jnp.concatenate(counts)) if runs is None else runs
            sizes = sizes * jnp.maximum(found, 1)
        found = ordered[:, 0] if found is None else found
        return statistics.from_table(ordered, sizes, names), ordered[:, 0], found

    def _ordered(self, table: Array) -> Array:
        index = self.rows.index
        return table if np.array_equal(index, np.arange(len(index))) else table[index]


def together(
    table: Float[Array, "rows m n"], names: tuple[str, ...]
) -> tuple[Float[Array, "rows n"], Float[Array, " rows"]]:
    """What `sums` returned for the parts of a tensor, as what it returns for the whole.

    Args:
        table: for each row the vectors of its `m` parts; zeros for a part that was not measured.
        names: attributes of `Sums`.

    Returns:
        The table of whole tensors, and how many parts each of them has.
    """
    measured = table[..., 0]
    columns = {name: table[..., 1 + k] for k, name in enumerate(names)}
    largest = jnp.max(columns["largest"], axis=-1)
    # a NaN, which a maximum may skip, makes the squares NaN whatever they are scaled by
    ratio = statistics.quotient_scale(largest)[..., None] / statistics.quotient_scale(
        columns["largest"]
    )
    squares = jnp.where(columns["squares"] == 0, 0, columns["squares"] * ratio * ratio)
    found = {name: jnp.sum(column, axis=-1) for name, column in columns.items()}
    found |= {"largest": largest, "squares": jnp.sum(squares, axis=-1)}
    whole = [jnp.max(measured, axis=-1), *(found[name] for name in names)]
    return jnp.stack(whole, axis=-1), jnp.sum(measured, axis=-1)


def _together(
    record: Array, site: Site, shared: tuple[int, ...], names: tuple[str, ...]
) -> tuple[Array, Array]:
    """A site's rows, and of how many measured tensors each consists."""
    width = 1 + len(names)
    if not shared:
        table = record.reshape(-1, width)
        return table, table[:, 0]
    kept = [k for k in range(len(site.lengths)) if k not in shared]
    rows = int(np.prod([site.lengths[k] for k in kept], dtype=int))
    ordered = jnp.transpose(record, (*kept, *shared, len(site.lengths)))
    return together(ordered.reshape(rows, -1, width), names)
