import torch
from torch import nn

torch.manual_seed(0)
# Yours, with its projection head:
encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 128))
# Yours, batches of two augmented views of each image:
loader = torch.randn(3, 2, 16, 3, 32, 32)
