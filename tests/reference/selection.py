"""Top-k by sorting every coordinate."""


def select(gradients, k, taken):
    """The k largest |g| that are not taken, ties to the lowest (tensor, index).

    Args:
        gradients: name -> tensor.
        k: how many.
        taken: name -> set of flat indices.
    """
    ranked = []
    for place, (name, gradient) in enumerate(gradients.items()):
        for index, value in enumerate(gradient.detach().double().flatten().tolist()):
            if index not in taken.get(name, ()):
                ranked.append((-abs(value), place, index))
    ranked.sort()
    names = list(gradients)
    chosen = {name: [] for name in names}
    for _, place, index in ranked[:k]:
        chosen[names[place]].append(index)
    return {name: sorted(indices) for name, indices in chosen.items()}


def select_in_tiles(gradients, k, taken, tile, num_tiles):
    """The k largest |g| that are not taken, within the ``num_tiles`` tiles whose largest such |g| is largest."""
    tiles = []
    for place, (name, gradient) in enumerate(gradients.items()):
        matrix = (
            gradient.double().reshape(gradient.shape[0] if gradient.dim() > 1 else 1, -1) if gradient.numel() else None
        )
        members = {}
        for row, values in enumerate(matrix.tolist() if matrix is not None else []):
            for column, value in enumerate(values):
                index = row * len(values) + column
                if index not in taken.get(name, ()):
                    members.setdefault((row // tile, column // tile), {})[index] = abs(value)
        tiles += [(-max(held.values()), place, position, name, held) for position, held in members.items()]
    tiles.sort(key=lambda entry: entry[:3])
    free = {name: set() for name in gradients}
    for *_, name, held in tiles[:num_tiles]:
        free[name] |= held.keys()
    outside = {name: set(range(gradient.numel())) - free[name] for name, gradient in gradients.items()}
    return select(gradients, k, outside)
