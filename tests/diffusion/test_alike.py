"""Equal tokens asked once, against diffusers' own attention to all of them."""

from __future__ import annotations

import pytest
import torch

from ddil_lightning.diffusion.alike import Alike
from sd3 import NETWORK


@pytest.mark.parametrize("checkpointing", [False, True])
def test_many_equal_tokens_are_one_that_is_louder(checkpointing: bool) -> None:
    """Outputs and gradients of the whole network, both attentions of its first block included; a call that says nothing is diffusers'."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(**NETWORK).double().train()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if checkpointing:
        network.enable_gradient_checkpointing()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([700.0, 20.0])
    text, pooled = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)

    def asked(zeros: int, **told: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        read = torch.cat([text, text.new_zeros(2, zeros, 32)], 1)
        kwargs = {"joint_attention_kwargs": told} if told else {}
        out = network(x, encoder_hidden_states=read, pooled_projections=pooled, timestep=t, return_dict=False, **kwargs)[0]
        return out.detach(), list(torch.autograd.grad(out.square().sum(), list(network.parameters()), allow_unused=True))

    plain, gradients = asked(37)
    network.set_attn_processor(Alike())
    for out, grads in (asked(37), asked(1, alike=37)):
        torch.testing.assert_close(out, plain, rtol=1e-9, atol=1e-9)
        for a, b in zip(grads, gradients, strict=True):
            assert (a is None) is (b is None)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(asked(1)[0], plain)
