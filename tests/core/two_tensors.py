"""The smallest model that has two tensors, for tests of KronosOpt."""

import torch

from ssrctl.core.kronos import KronosOpt


def make(lr=0.1, **options):
    named = {"w": torch.nn.Parameter(torch.zeros(8)), "v": torch.nn.Parameter(torch.zeros(4))}
    return named, KronosOpt(named.items(), lr, **options)


def fill(named, w, v=None):
    named["w"].grad = torch.tensor(w)
    named["v"].grad = None if v is None else torch.tensor(v)
