"""Where the loss of every prompt is known, sizes go where a unit of cost saves every code's prompts the same."""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

import torch

from aptp.price import marginals
from aptp.sizes import adapted_sizes

NEED = torch.tensor([1.0, 1.5, 3.0, 5.0]).repeat_interleave(25)
CODES = torch.arange(4).repeat_interleave(25)


def losses_at(sizes, fall=8.0):
    return NEED[:, None] * torch.exp(-fall * sizes)


def test_marginal_losses_become_equal_to_the_price():
    sizes, price = torch.tensor([0.4, 0.5, 0.6, 0.85]), torch.tensor(0.15)
    for _ in range(60):
        found = marginals(sizes, losses_at(sizes), CODES)
        sizes = adapted_sizes(sizes, found, price, rate=0.3, most=0.05)
    own = losses_at(sizes)[torch.arange(100), CODES]
    assert torch.allclose(8 * own, price.expand(100), rtol=0.01)
    assert torch.allclose(sizes - sizes[0], (NEED[::25] / NEED[0]).log() / 8, atol=1e-3)


def test_sizes_shrink_where_no_price_is_enough_and_codes_of_one_size_say_nothing():
    sizes = torch.tensor([0.4, 0.5, 0.6, 0.85])
    found = marginals(sizes, losses_at(sizes), torch.zeros(100, dtype=torch.long))
    assert torch.allclose(adapted_sizes(sizes, found, torch.tensor(1e9), rate=0.3, most=0.05), 0.95 * sizes)
    assert torch.allclose(adapted_sizes(sizes, found, torch.tensor(0.0), rate=0.3, most=0.05), 1.05 * sizes)
    alike = torch.full((4,), 0.5)
    found = marginals(alike, losses_at(alike), CODES)
    assert torch.equal(adapted_sizes(alike, found, torch.tensor(0.1), rate=0.3, most=0.05), alike)
