"""Prints the golden figures of jobs/src/train/metrics.rs, by scikit-learn."""

import numpy
from sklearn.metrics import roc_auc_score, roc_curve

SCORES = [0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1]
LABELS = numpy.array([1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0])

print("roc_auc", repr(float(roc_auc_score(LABELS, SCORES))))
alarms, hits, _ = roc_curve(LABELS, SCORES, drop_intermediate=False)
for share in (0.01, 0.2, 1.0):
    last = numpy.flatnonzero(alarms <= share)[-1]
    found, wrong = hits[last] * LABELS.sum(), alarms[last] * (1 - LABELS).sum()
    print("at", share, "precision", float(found / (found + wrong)), "recall", float(hits[last]))
