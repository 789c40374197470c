"""The noisy quadratic model as a module: many particles at once."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader


class Particles(LightningModule):
    """One weight for each particle and mode; the optimum of each is drawn anew in each step."""

    def __init__(self, count, steps, *, learning_rate, curvature, noise_variance):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(count, len(curvature), dtype=torch.float64))
        self.curvature = torch.tensor(curvature, dtype=torch.float64)
        self.deviation = torch.tensor(noise_variance, dtype=torch.float64).sqrt()
        self.random = torch.Generator().manual_seed(5)
        self.learning_rate, self.steps = learning_rate, steps

    def training_step(self, batch, batch_idx):
        optimum = self.deviation * torch.randn(self.x.shape, dtype=torch.float64, generator=self.random)
        return (self.curvature * (self.x - optimum) ** 2).sum() / 2

    def configure_optimizers(self):
        return torch.optim.SGD([self.x], lr=self.learning_rate)

    def train_dataloader(self):
        return DataLoader(range(self.steps))

    def variance(self):
        return self.x.detach().var(dim=0, correction=0).numpy()
