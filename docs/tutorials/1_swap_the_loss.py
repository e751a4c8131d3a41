"""Swap the loss in a SimCLR loop
==============================

Put :class:`slr_plugin.SLRLoss` in the place of the NT-Xent loss. This page trains the same network twice, once
with each loss, and compares losses, accuracy and memory.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from slr_plugin import SLRLoss

# %%
# The data: scanned digits of 8 x 8 pixels, 1,400 to train on and the rest to judge with. A view
# is the image moved, turned and stretched at random, with noise.

digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16
train, test = slice(0, 1400), slice(1400, None)


def view(batch):
    """Move, turn and stretch each image a little, and add noise."""
    moves = torch.eye(2, 3) + 0.15 * torch.randn(len(batch), 2, 3)
    grid = F.affine_grid(moves, batch.shape, align_corners=False)
    moved = F.grid_sample(batch, grid, align_corners=False)
    return moved + 0.1 * torch.randn_like(batch)


# %%
# The loss that most SimCLR code has. It stores a matrix with a row and a column for each view.


def nt_xent(a, b, temperature=0.1):
    """Compare every view with every other one; its positive is the other view of its image."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(-torch.inf)
    own = torch.arange(len(z)).roll(len(a))
    return F.cross_entropy(logits, own)


# %%
# The loop. ``criterion`` is all that will change.


def pretrain(criterion, epochs=10):
    """Train an encoder with its projection head; return it with the loss of every epoch."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 128),
    )
    head = nn.Sequential(nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in images[train][torch.randperm(1400)].split(200):
            loss = criterion(head(encoder(view(batch))), head(encoder(view(batch))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / 7
        losses.append(total)
    return encoder, losses


def accuracy(encoder):
    """The share of test images whose nearest training images have their class."""
    with torch.no_grad():
        features = F.normalize(encoder(images), dim=1).numpy()
    judge = KNeighborsClassifier(10).fit(features[train], digits.target[train])
    return judge.score(features[test], digits.target[test])


# %%
# Train with both. ``confidence=0.0`` asks for one-hot labels, which are NT-Xent's.

before, losses_before = pretrain(nt_xent)
after, losses_after = pretrain(SLRLoss(0.1, confidence=0.0))
print(f"accuracy with nt_xent {accuracy(before):.1%}, with SLRLoss {accuracy(after):.1%}")

figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(losses_before, linewidth=6, alpha=0.3, label="nt_xent")
axes.plot(losses_after, label="SLRLoss")
axes.set(xlabel="epoch", ylabel="loss")
axes.legend()
plt.show()

# %%
# The curves lie on each other, since value and gradient are the same to rounding. The next
# figure shows what differs: the memory that a loss keeps until its backward pass. Tests compare
# SLRLoss with lightly's NTXentLoss in the same way, and :doc:`/cost` times both.


def kept(criterion, rows):
    """Megabytes that are kept for the backward pass of a batch of so many images."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    a, b = torch.randn(2, rows, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = criterion(a, b)
    assert loss.isfinite()
    return sum(storages.values()) / 1e6


rows = [128, 256, 512, 1024, 2048]
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for name, criterion in (("nt_xent", nt_xent), ("SLRLoss", SLRLoss(0.1, confidence=0.0))):
    axes.loglog(rows, [kept(criterion, count) for count in rows], ".-", label=name)
axes.set(xlabel="images in the batch", ylabel="kept for backward (MB)")
axes.set_xticks(rows, rows)
axes.minorticks_off()
axes.legend()
plt.show()

# %%
# Next, tell the loss which samples belong together
# (:ref:`how <sphx_glr_gallery_2_labels_from_what_you_know.py>`).
