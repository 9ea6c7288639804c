"""Page-Hinkley test for a rise of a mean (Page 1954; Hinkley 1971), as river's ``PageHinkley`` in mode "up"."""

from __future__ import annotations

from streams.contracts import Record


class PageHinkley(Record, frozen=True, array_like=True, gc=False):
    """State of the test after ``n`` values, immutable; ``update`` gives the next state.

    With mean_t the running mean, m_t = m_{t-1} + x_t - mean_t - delta; the alarm is m_t - min(m) > threshold.
    """

    n: int = 0
    mean: float = 0.0
    cumulative: float = 0.0
    minimum: float = 0.0

    def update(self, value: float, delta: float) -> PageHinkley:
        """The state after ``value``. ``delta``: a rise of the mean below this is tolerated."""
        n = self.n + 1
        mean = self.mean + (value - self.mean) / n
        cumulative = self.cumulative + value - mean - delta
        return PageHinkley(n, mean, cumulative, min(self.minimum, cumulative))

    def alarm(self, threshold: float, min_values: int) -> bool:
        """Whether the mean has risen. The first ``min_values`` values are too few to tell."""
        return self.n >= min_values and self.cumulative - self.minimum > threshold
