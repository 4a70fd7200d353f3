"""SSR algorithm 2 with dense boolean masks and sorting, in numpy float32."""

import math

import numpy as np


class DenseKronos:
    """One claimed mask and one dense sum per parameter."""

    def __init__(self, parameters, rates, protected, max_grad_norm):
        self.theta = {name: np.array(value, dtype=np.float32) for name, value in parameters.items()}
        self.rates = rates
        self.protected = {name: np.array(mask, dtype=bool) for name, mask in protected.items()}
        self.max_grad_norm = max_grad_norm
        self.total = {name: np.zeros_like(value) for name, value in self.theta.items()}
        self.updated = {name: np.zeros(value.shape, dtype=bool) for name, value in self.theta.items()}

    def question(self, units):
        """``units``: (gradients by name, k) in step order; returns the selected sets as dense masks."""
        claimed = {name: mask.copy() for name, mask in self.protected.items()}
        sets = []
        for gradients, k in units:
            ranked = sorted(
                (-abs(float(value)), place, index)
                for place, name in enumerate(self.theta)
                if name in gradients
                for index, value in enumerate(gradients[name].flat)
                if not claimed[name].flat[index]
            )
            names = list(self.theta)
            chosen = {name: np.zeros(value.shape, dtype=bool) for name, value in self.theta.items()}
            for _, place, index in ranked[:k]:
                chosen[names[place]].flat[index] = True
            for name, mask in chosen.items():
                claimed[name] |= mask
                if name in gradients:
                    self.total[name] += np.where(mask, gradients[name], np.float32(0))
                self.updated[name] |= mask
            sets.append(chosen)
        return sets

    def step(self):
        squares = [float(v) ** 2 for name in self.theta for v in self.total[name].flat]
        norm = math.sqrt(math.fsum(squares))
        scale = min(1.0, self.max_grad_norm / norm) if self.max_grad_norm and norm else 1.0
        for name, value in self.theta.items():
            value[...] -= np.float32(self.rates[name] * scale) * self.total[name]
            self.total[name][...] = 0
        count = sum(int(mask.sum()) for mask in self.updated.values())
        for mask in self.updated.values():
            mask[...] = False
        return norm, scale, count
