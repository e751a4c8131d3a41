"""Representations: what each loss is worth, measured with everything else held equal.

``python -m benchmarks representations`` trains one encoder per method and seed and keeps each finished run as a line
of JSON, so that a harness that was stopped goes on where it was. Encoder, initial weights, data order, views, optimiser
and schedule are a seed's, the same for every method; only :mod:`benchmarks.representations.methods` differs. Classes
serve evaluation and the measurement of labels. They are trained on only where that is the experiment, in the methods
``oracle-...``, ``supervised`` and those whose names hold ``classes`` or ``guesses``.
"""
