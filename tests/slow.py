"""The package's steps once more, slowly: full passes, stored activations, least squares on the augmented system."""

import torch

from greedy_helpers import set_weight, weight_of


def recorded(model, linear, tokens):
    """(input, output) of one linear in a full pass, [tokens, channels] each."""
    seen = []
    handle = linear.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return [part.flatten(0, -2) for part in seen[0]]


def refit_slowly(linear, x, y, damp):
    """Refit a layer to y [tokens, d_y] on x [tokens, d_x], toward its current weight; a bias is solved by centring."""
    w0, centre = weight_of(linear), linear.bias is not None
    x_mean, y_mean = (x.mean(0), y.mean(0)) if centre else (torch.zeros(()), torch.zeros(()))
    x, y = x - x_mean, y - y_mean
    lam = damp * x.square().sum() / x.shape[1]
    above = torch.cat([x, lam.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    new = torch.linalg.lstsq(above, torch.cat([y, lam.sqrt() * w0.T])).solution.T
    set_weight(linear, new, y_mean - new @ x_mean if centre else None)
