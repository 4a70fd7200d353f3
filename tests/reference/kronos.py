"""SSR algorithm 2 with dense masks, dense sums and dense moments, in numpy float32."""

import math

import numpy as np
import torch

from reference.allocations import disjoint

F32 = np.float32


class DenseKronos:
    """Everything is an array of the parameter's shape.

    Args:
        parameters: arrays by name.
        rates: learning rate by name.
        protected: bool arrays by name.
        max_grad_norm: 0 is off.
        allocate: see ``reference.allocations``.
        rule: ``sgd``, ``adam`` or ``rms``.
        betas, eps: of the rule, one for all or by name.
    """

    def __init__(
        self,
        parameters,
        rates,
        protected,
        max_grad_norm,
        *,
        allocate=disjoint,
        rule="sgd",
        betas=(0.9, 0.95),
        eps=1e-8,
    ):
        self.theta = {name: np.array(value, dtype=F32) for name, value in parameters.items()}
        self.rates = rates
        self.protected = {name: np.array(mask, dtype=bool) for name, mask in protected.items()}
        self.max_grad_norm, self.allocate, self.rule = max_grad_norm, allocate, rule
        self.betas = betas if isinstance(betas, dict) else dict.fromkeys(self.theta, betas)
        self.eps = eps if isinstance(eps, dict) else dict.fromkeys(self.theta, eps)
        self.total, self.squares, self.first, self.second = (self._like(F32) for _ in range(4))
        self.waiting, self.ever = self._like(bool), self._like(bool)

    def _like(self, dtype):
        return {name: np.zeros(value.shape, dtype=dtype) for name, value in self.theta.items()}

    @property
    def num_unprotected(self):
        return sum(int((~mask).sum()) for mask in self.protected.values())

    def question(self, units):
        """``units``: (gradients by name, k) in step order; returns the claimed sets as dense masks."""
        sets, kept = self.allocate(units, self.protected)
        for mask, gradients in kept:
            here = {name: np.where(mask[name], gradients[name], F32(0)) for name in mask if name in gradients}
            count = sum(int(mask[name].sum()) for name in here)
            mean = math.fsum(float(v) ** 2 for values in here.values() for v in values.flat) / max(count, 1)
            for name, values in here.items():
                scaled = values * F32(1 / (math.sqrt(mean) + self.eps[name])) if self.rule == "rms" else values
                self.total[name] += scaled
                self.squares[name] += scaled * scaled
                self.waiting[name] |= mask[name]
        return sets

    def step(self):
        """Apply what was kept; returns (norm of the kept gradient, clip scale, updated coordinates)."""
        norm = math.sqrt(math.fsum(float(v) ** 2 for values in self.total.values() for v in values.flat))
        clips = self.max_grad_norm and norm and self.rule != "rms"
        scale = min(1.0, self.max_grad_norm / norm) if clips else 1.0
        for name, theta in self.theta.items():
            direction = self._adam(name, scale) if self.rule == "adam" else F32(scale) * self.total[name]
            theta[...] = np.where(self.waiting[name], theta - F32(self.rates[name]) * direction, theta)
            self.ever[name] |= self.waiting[name]
        count = sum(int(mask.sum()) for mask in self.waiting.values())
        self.total, self.squares, self.waiting = self._like(F32), self._like(F32), self._like(bool)
        return norm, scale, count

    def _adam(self, name, scale):
        """Moments of all coordinates, written only where a gradient was kept."""
        b1, b2 = self.betas[name]
        gradient, squares = F32(scale) * self.total[name], F32(scale**2) * self.squares[name]
        first = F32(b1) * self.first[name] + F32(1 - b1) * gradient
        decayed = F32(b2) * self.second[name] + F32(1 - b2) * squares
        second = np.where(self.ever[name], decayed, squares)
        self.first[name] = np.where(self.waiting[name], first, self.first[name])
        self.second[name] = np.where(self.waiting[name], second, self.second[name])
        # torch's float32 square root is off by a unit in the last place on some CPUs, so it is taken from torch.
        root = torch.from_numpy(self.second[name]).sqrt().numpy()
        return self.first[name] / (root + F32(self.eps[name]))
