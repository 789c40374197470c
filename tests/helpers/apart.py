"""Ranks that train apart: modules with data of their own on each rank, and a simulation of all in one process."""

import os

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, inputs, make_trainer


class Apart(Regression):
    """Data of its own on each rank. The data of a step depend on its number and the rank alone."""

    plugins = ()

    def without(self, step):
        return False

    def drop(self, step):
        """Leave out gradients at a step."""

    def __init__(self, optimizer="Adam", **settings):
        super().__init__(optimizer, **settings)
        self.validated = []

    @property
    def rank(self):
        return self.global_rank

    def loss(self, step):
        return (self.net(self.data(step * 7 + self.rank)) - 1).square().mean()

    def data(self, step):
        return inputs(step).to(self.net[0].weight.dtype)

    def validation_step(self, batch, batch_idx):
        loss = (self.net(self.data(1000)) - 1).square().mean()
        self.validated.append(loss.item())
        self.log("val_loss", loss)


class Alike(Apart):
    """All ranks have the first one's data."""

    rank = 0


class Normed(Apart):
    """BatchNorm, a buffer that each rank moves by itself, and a learning rate that falls."""

    def __init__(self, optimizer="Adam", **settings):
        super().__init__(optimizer, **settings)
        self.net.insert(1, nn.BatchNorm1d(4, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return self.net(self.data(0))

    def training_step(self, batch, batch_idx):
        self.seen += 1 + self.rank
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8), "interval": "step"}]


class AlikeNormed(Normed):
    """All ranks have the first one's data."""

    rank = 0


class AlikeGroups(Alike):
    """The second layer has cycles and a step size of its own, and the first bias is frozen."""

    def __init__(self, optimizer="Adam"):
        super().__init__(optimizer)
        self.net[0].bias.requires_grad_(False)

    def configure_optimizers(self):
        first, second = (list(self.net[layer].parameters()) for layer in (0, 2))
        own = {"lookahead_k": 2, "lookahead_alpha": 0.8}
        return self.optimizer_class([{"params": first}, {"params": second, **own}], **self.settings)


class ByHand(Apart):
    """Steps by manual optimization, twice in every other batch."""

    def __init__(self, optimizer="Adam", **settings):
        super().__init__(optimizer, **settings)
        self.automatic_optimization = False
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(1 + batch_idx % 2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(int(self.taken)))
            optimizer.step()
            self.taken += 1


class Missing(Apart):
    """The second rank alone has no gradient of a bias in a cycle, and no gradient at all at a step of the next one."""

    def on_before_optimizer_step(self, optimizer):
        self.drop(self.trainer.global_step)

    def drop(self, step):
        for parameter in self.net.parameters() if step == 7 else [self.net[2].bias]:
            if self.rank == 1 and step in {3, 4, 5, 7}:
                parameter.grad = None


class Still(Apart):
    """At a learning rate of zero, as a warm-up may begin."""

    def __init__(self, optimizer="Adam"):
        super().__init__(optimizer, lr=0.0)


class Scaled(Apart):
    """Of float32 with a gradient scaler, which skips a step on the second rank alone and halves that rank's scale."""

    def __init__(self, optimizer="Adam", **settings):
        super().__init__(optimizer, **settings)
        self.net.float()

    def loss(self, step):
        with torch.autocast("cpu", enabled=False):
            loss = super().loss(step)
        return loss * float("inf") if self.without(step) else loss

    def without(self, step):
        return (step, self.rank) == (4, 1)

    @property
    def plugins(self):
        return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))]


class Halves(Apart):
    """Of bfloat16."""

    def __init__(self, optimizer="Adam", **settings):
        super().__init__(optimizer, **settings)
        self.net.bfloat16()


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


class Uneven(Apart):
    """The second rank has fewer batches, and a loader that says so or not."""

    def __init__(self, optimizer="Adam", sized=True):
        super().__init__(optimizer)
        self.sized = sized

    def train_dataloader(self):
        data = range(5 - self.rank)
        return DataLoader(data if self.sized else Stream(data), batch_size=None)


class UnevenStream(Uneven):
    def __init__(self, optimizer="Adam"):
        super().__init__(optimizer, sized=False)


class SizedStream(Stream):
    def __init__(self, data, length):
        super().__init__(data)
        self.length = length

    def __len__(self):
        return self.length


class EvenStream(UnevenStream):
    def train_dataloader(self):
        return DataLoader(Stream(range(4)), batch_size=None)


class Forgetful(ByHand):
    """The second rank leaves out a step."""

    def training_step(self, batch, batch_idx):
        if (int(self.taken), self.rank) == (1, 1):
            return
        super().training_step(batch, batch_idx)


class Lazy(ByHand):
    """Steps once in a batch; the second rank once leaves the step out after its backward."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(int(self.taken)))
        if (int(self.taken), self.rank) != (1, 1):
            optimizer.step()
        self.taken += 1


class Short(Apart):
    """One rank's data end before the length that their loader says."""

    early, length, batches_there = 1, 6, 4

    def train_dataloader(self):
        number = self.batches_there if self.rank == self.early else self.length
        return DataLoader(SizedStream(range(number), self.length), batch_size=None)


class ShortFirst(Short):
    early = 0


class Empty(Short):
    """A stream in which one rank finds nothing."""

    batches_there = 0

    def train_dataloader(self):
        return DataLoader(Stream(range(0 if self.rank == self.early else 6)), batch_size=None)


class EmptyFirst(Empty):
    early = 0


class Leaving(Apart):
    """One rank leaves the epoch after two batches."""

    early = 1

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (batch_idx, self.rank) == (2, self.early) else None

    def train_dataloader(self):
        return DataLoader(range(6))


class LeavingFirst(Leaving):
    early = 0


class Stopping(Leaving):
    """One rank stops training after two batches."""

    def on_train_batch_start(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop = (batch_idx, self.rank) == (1, self.early)


class StoppingFirst(Stopping):
    early = 0


class Written(Apart):
    """Each rank writes to a bias that has no gradient on any."""

    def on_before_optimizer_step(self, optimizer):
        self.net[2].bias.grad = None
        with torch.no_grad():
            self.net[2].bias.add_(1.0 + self.rank)


class Unwell(Normed):
    """A statistic is infinite on the second rank in the first cycle."""

    def on_before_optimizer_step(self, optimizer):
        if (self.trainer.global_step, self.rank) == (1, 1):
            self.net[1].running_var[0] = float("inf")


class Mixed(Apart):
    """Of float32, in bfloat16 where autocast makes it so."""

    def __init__(self, optimizer="Adam"):
        super().__init__(optimizer)
        self.net.float()

    def loss(self, step):
        with torch.autocast("cpu", torch.bfloat16):
            return (self.net(self.data(step * 7 + self.rank)).float() - 1).square().mean()


class Poisoned(Apart):
    """The second rank's weights are NaN after step 4."""

    def on_before_zero_grad(self, optimizer):
        if (self.trainer.global_step, self.rank) == (5, 1):
            with torch.no_grad():
                self.net[0].bias[0] = float("nan")


class Unfreezing(Apart):
    """The first layer is frozen for four steps; on the second rank for ``later`` more."""

    later = 0

    def __init__(self, optimizer="Adam"):
        super().__init__(optimizer)
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 4 + self.later * self.rank:
            self.net[0].requires_grad_(True)


class UnfreezingLater(Unfreezing):
    later = 4


class Players(Apart):
    """Two optimizers by hand."""

    def __init__(self, optimizer="Adam"):
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.other = nn.Linear(3, 2, dtype=torch.float64)

    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.SGD(self.other.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch_idx) + self.other_loss(batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def other_loss(self, step):
        return (self.other(self.data(step * 7 + self.rank)) - 1).square().mean()


class Measured(Apart):
    """Validates on data of its own on each rank."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(1000), sync_dist=True)


def measure(module, batch):  # noqa: ARG001 (the data are the ranks' own)
    x = module.data(500 + module.rank)
    prediction = module.net(x)
    return prediction, torch.ones_like(prediction)


def fit(*callbacks, module, ckpt_path=None, trainer=(), **options):
    """Train on this rank with the others; return the Trainer and the callback."""
    settings = {"max_steps": 10, "limit_val_batches": 1, "val_check_interval": 2, "plugins": [*module.plugins]}
    settings = {"strategy": "ddp", **settings, **dict(trainer)}
    callback = LookaheadCallback(**{"k": 3, "share_gradients": False, **options})
    run = make_trainer(callback, *callbacks, devices=int(os.environ["WORLD_SIZE"]), **settings)
    run.fit(module, ckpt_path=ckpt_path)
    return run, callback


class Outer:
    """phi and b of the rule that is written out here, without Lightning and without processes."""

    def __init__(self, module, momentum, nesterov):
        self.phi = [wide(p.detach()).clone() for p in module.net.parameters()]
        self.momentum = momentum
        self.sgd = torch.optim.SGD(self.phi, 1.0, momentum, nesterov=nesterov and momentum > 0, foreach=False)

    def step(self, thetas, alpha):
        """Move phi towards the mean of all workers' theta, and every theta to phi."""
        self.sgd.param_groups[0]["lr"] = alpha
        for slow, mean in zip(self.phi, mean_of(thetas), strict=True):
            slow.grad = slow - mean
            if not self.momentum:
                slow.lerp_(mean, alpha)
        if self.momentum:
            self.sgd.step()
        for theta in thetas:
            copy(self.phi, theta)

    @property
    def b(self):
        return [own["momentum_buffer"] for own in self.sgd.state.values()]


def simulated(number, steps=10, *, k=3, alpha=0.5, momentum=0.0, nesterov=True, share=0, clip=None, make=Apart):
    """theta of each worker, phi and b of Local SGD with an outer step.

    Args:
        number: How many workers.
        steps: How many steps each takes.
        k: Steps from one sync to the next.
        alpha: Of the outer step, or a function of the number of syncs before it.
        momentum: Of the outer step.
        nesterov: Whether that is Nesterov's.
        share: Steps at the beginning in which gradients are averaged.
        clip: Norm that gradients are clipped to.
        make: Makes a worker's module.
    """
    workers = [make() for _ in range(number)]
    for rank, worker in enumerate(workers):
        worker.__class__ = type("Worker", (type(worker),), {"rank": rank})
    optimizers = [worker.configure_optimizers() for worker in workers]
    thetas = [[p.detach() for p in worker.net.parameters()] for worker in workers]
    outer = Outer(workers[0], momentum, nesterov)
    for step in range(steps):
        for worker, optimizer in zip(workers, optimizers, strict=True):
            optimizer.zero_grad()
            worker.loss(step).backward()
            worker.drop(step)
        if step < share:
            average([[p.grad for p in worker.net.parameters()] for worker in workers])
        for worker, optimizer in zip(workers, optimizers, strict=True):
            if clip:
                nn.utils.clip_grad_norm_(worker.net.parameters(), clip)
            if not worker.without(step):
                optimizer.step()
        if step < share:
            copy(thetas[0], outer.phi)
        elif (step + 1 - share) % k == 0:
            outer.step(thetas, alpha((step - share) // k) if callable(alpha) else alpha)
    return thetas, outer.phi, outer.b


def copy(sources, targets):
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def average(lists):
    """Let the tensors of each list be the mean over all lists."""
    for mean, *same in zip(mean_of(lists), *lists, strict=True):
        copy([mean] * len(same), same)


def mean_of(lists):
    """The mean of the tensors over all lists, in float32 at least."""
    return [sum(wide(tensor) / len(lists) for tensor in same) for same in zip(*lists, strict=True)]


def wide(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def differences(left, right, at=""):
    """Where two nestings of dicts, lists and tensors are not equal."""
    if isinstance(left, torch.Tensor):
        return [] if isinstance(right, torch.Tensor) and torch.equal(left, right) else [at]
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [path for key in left for path in differences(left[key], right[key], f"{at}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = zip(left, right, strict=True)
        return [path for index, pair in enumerate(pairs) for path in differences(*pair, f"{at}/{index}")]
    return [] if left == right else [at]
