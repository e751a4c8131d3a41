"""Labels from what you know
=========================

Tell the loss which samples belong together, or how much they resemble each other. This page
trains an encoder for digits in front of a background that nobody cares about. Telling images
apart by their backgrounds is easy, so labels that know better should help.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader, Dataset

from slr_plugin import SLRLoss, presets

digits = load_digits()
clean = torch.from_numpy(digits.images).float() / 16
classes = torch.from_numpy(digits.target)
torch.manual_seed(0)
backgrounds = F.interpolate(torch.rand(len(clean), 1, 3, 3), size=(8, 8), mode="bilinear")
images = clean + backgrounds[:, 0]
train, test = slice(0, 900), slice(900, None)

figure, panels = plt.subplots(1, 6, figsize=(5, 1), layout="constrained")
for panel, image in zip(panels, images, strict=False):
    panel.imshow(image, cmap="gray")
    panel.axis("off")
plt.show()

# %%
# What is known, a row for each training image:
#
# - ``features``: those of another sensor, which sees no background. It is there in training
#   only. Its columns are standardised: features are compared by their cosine.
# - ``groups``: the class of every fourth image, and -1 for all others.

features = clean[train].flatten(1)
features = (features - features.mean(0)) / (features.std(0) + 0.1)
groups = torch.full((900,), -1)
groups[::4] = classes[train][::4]

# %%
# A DataLoader shuffles, so the Dataset returns what is known together with the views.


class WithKnowledge(Dataset):
    """Two views of each sample, its features and the id of its group."""

    def __init__(self, samples, features, groups):
        self.samples, self.features, self.groups = samples, features, groups

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.view(index), self.view(index), self.features[index], self.groups[index]

    def view(self, index):
        """Add noise, and hide a quarter of the pixels."""
        sample = self.samples[index]
        seen = torch.rand_like(sample) > 0.25
        return (sample + 0.1 * torch.randn_like(sample)) * seen


data = WithKnowledge(images[train].flatten(1), features, groups)

# %%
# One loop for three trainings: without knowledge, with groups, with features.


def pretrain(criterion, names=(), epochs=15):
    """Train an encoder; ``names`` says what the loss is told."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128))
    head = nn.Sequential(nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(epochs):
        for x0, x1, features, groups in DataLoader(data, batch_size=180, shuffle=True):
            known = {"estimator": features, "groups": groups}
            told = {name: known[name] for name in names}
            loss = criterion(head(encoder(x0)), head(encoder(x1)), **told)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder


def accuracy(samples):
    """The share of test samples whose nearest training samples have their class."""
    table = F.normalize(samples, dim=1).detach().numpy()
    judge = KNeighborsClassifier(10).fit(table[train], digits.target[train])
    return judge.score(table[test], digits.target[test])


plain = pretrain(SLRLoss(0.1, confidence=0.0))
grouped = pretrain(SLRLoss(0.1, confidence=0.0), ["groups"])
estimated = pretrain(presets.FROM_FEATURES.loss(), ["estimator"])

# %%
# Judge all three by test images with their backgrounds. The last two lines are of no network:
# the images as they are, and the other sensor's.

scores = {
    "no knowledge": accuracy(plain(images.flatten(1))),
    "groups of a fourth": accuracy(grouped(images.flatten(1))),
    "features": accuracy(estimated(images.flatten(1))),
    "images, no network": accuracy(images.flatten(1)),
    "other sensor, no network": accuracy(clean.flatten(1)),
}
for name, score in scores.items():
    print(f"{name:26} {score:.1%}")

figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
bars = axes.barh(list(scores), [100 * score for score in scores.values()])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xlabel="accuracy of the nearest neighbours (%)", xlim=(0, 110))
axes.invert_yaxis()
plt.show()

# %%
# Both kinds of knowledge help, and no encoder reaches the plain images here: digits are easy and
# these views are poor. **Evaluate what you have without a network, too.** This is one seed;
# intervals, and data where it helped or did not, are on the page `Choose <../choose.html>`_.
#
# Before you train with such labels, measure whether they are any good
# (:ref:`how <sphx_glr_gallery_3_are_my_labels_any_good.py>`).
