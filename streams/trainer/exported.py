"""The trainer's gauges."""

from __future__ import annotations

from streams import metrics
from streams.trainer.trainer import MAIN, SHADOW, Trainer


def export(trainer: Trainer) -> None:
    """Set the gauges of progressive validation, the gain of pseudo-labels and the ids."""
    figures = trainer.figures()
    for model, of in figures.items():
        for name, value in of.items():
            metrics.PROGRESSIVE.labels(name, model).set(value)
    if SHADOW in figures:
        for name in figures[MAIN].keys() & figures[SHADOW].keys():
            metrics.PSEUDO_LABEL_GAIN.labels(name).set(figures[MAIN][name] - figures[SHADOW][name])
    for window, models in trainer.slices().items():
        for model, slices in models.items():
            for part, found in slices.items():
                for name, value in found.items():
                    metrics.PROGRESSIVE_SLICE.labels(name, model, part, window).set(value)
    reading = trainer.evidence()
    metrics.LABEL_EVIDENCE_WEIGHT.set(reading.weight)
    metrics.LABEL_EVIDENCE_EFFECT.labels("mean").set(reading.effect)
    metrics.LABEL_EVIDENCE_EFFECT.labels("low").set(reading.low)
    for table, count in trainer.ids().items():
        metrics.IDS.labels(table).set(count)
