"""Are my labels any good?
=======================

Compare labels with the classes of a few samples, before and during training. Training never
sees these classes.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from slr_plugin import presets
from slr_plugin.diagnostics import LabelMonitor, label_quality

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().flatten(1) / 16
classes = torch.from_numpy(digits.target)

# %%
# Before training
# ---------------
#
# Labels from features do not depend on the network, so 300 samples with classes tell how good
# they are. Take two kinds of features: the pixels of the lower half, and noise.

few = 300
candidates = {"lower half": images[:few, 32:], "noise": torch.randn(few, 32)}
criterion = presets.FROM_FEATURES.loss()
both = classes[:few].repeat(2)  # once for each view
for name, features in candidates.items():
    standardised = (features - features.mean(0)) / (features.std(0) + 0.1)
    labels = criterion.labels(*torch.randn(2, few, 16), estimator=standardised)
    quality = label_quality(labels, both, both, own=torch.arange(2 * few).roll(few))
    print(f"{name}: {quality}\n")

# %%
# *Purity* is the share of the right class in what a label gives away. Labels of noise are as
# pure as blind ones, and would harm the training.
#
# During training
# ---------------
#
# Labels that the loss refines by itself change with the network. Here MoCo trains with
# the settings of the paper and a queue of 512 keys. A monitor follows the loss; every fourth
# sample has a class.

known = torch.where(torch.arange(len(classes)) % 4 == 0, classes, -1)
encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
target = copy.deepcopy(encoder).requires_grad_(False)
optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3)
epochs, size = 15, 128
steps = epochs * (len(images) // size)
criterion = presets.CIFAR10.loss(dim=64, total_steps=steps, memory_bank_size=(512, 64))
monitor = LabelMonitor(criterion)


def view(batch):
    """Add noise, and hide a quarter of the pixels."""
    return (batch + 0.1 * torch.randn_like(batch)) * (torch.rand_like(batch) > 0.25)


rows = []
for _ in range(epochs):
    for batch in torch.randperm(len(images)).split(size)[:-1]:  # the last one is smaller
        with torch.no_grad():
            pairs = zip(target.parameters(), encoder.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 0.05)
            keys = target(view(images[batch]))
        # The classes of the next call, which training ignores:
        monitor.announce(known[batch])
        loss = criterion(encoder(view(images[batch])), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows.append(monitor.mean())  # of this epoch
print(rows[-1])

figure, (upper, lower) = plt.subplots(
    2, 1, figsize=(5, 5), sharex=True, layout="constrained"
)
upper.plot([100 * row.purity for row in rows], label="labels")
upper.plot([100 * row.chance for row in rows], "--", color="grey", label="blind labels")
upper.set(ylabel="purity (%)", ylim=(0, 100))
upper.legend()
lower.plot([100 * (1 - row.own) for row in rows])
lower.set(xlabel="epoch", ylabel="given away (%)", ylim=(0, None))
plt.show()

# %%
# Labels give away more as the confidence grows. Look at both panels: pure labels that give away
# next to nothing change nothing. `What to make of it <../diagnostics.html#what-to-make-of-it>`_
# has the thresholds that were measured.
