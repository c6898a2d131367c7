"""
methods.py: two losses that are too costly, or too harmful, to be part of the method, for
comparison: MemDLM with the exact outer gradient, and pretraining with a memory.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import memdlm
from memdlm import Memory


def exact_method(model, batch, memory: Memory, generator) -> Tensor:
    """MemDLM's loss, in which phi_K is a function of theta and no constant: its gradient has the
    second-order terms that Eq. 10 leaves out. The factor that clips a gradient stays a constant."""
    anchor = memdlm.draw_anchor(batch.maskable, generator)
    stages = memdlm.make_stages(anchor, batch.maskable, memory, generator)
    fast = memdlm.init_fast(model, memory, memory.sets(len(batch.x0)), generator)
    fast = fast.with_tensors([part.requires_grad_() for part in fast.tensors()])
    limit = memory.clip or math.inf
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        for stage in stages * memory.epochs:
            stage = stage._replace(h=memdlm.prefix(model, batch, stage.masked, memory))
            loss = memdlm.stage_loss(model, batch, stage, fast, memory).sum()
            grads = torch.autograd.grad(loss, fast.tensors(), create_graph=True)
            norms = (memory.norms or memdlm.each_norm)([grad.detach() for grad in grads])
            factors = [(limit / (norm + 1e-12)).clamp(max=1) for norm in norms]
            steps = [memory.lr * factor * grad for factor, grad in zip(factors, grads)]
            fast = fast.with_tensors([p - step for p, step in zip(fast.tensors(), steps)])
        h = memdlm.embed(model, batch.x0, anchor.masked)
        return memdlm.denoising_loss(model, batch, anchor, h, 0, fast)


def pretraining_with_memory(own: Memory, model, batch, memory, generator) -> Tensor:
    """The loss of the base (`training.pretraining_method`) on the same masks, but behind an inner
    loop with the settings `own`."""
    anchor = memdlm.draw_anchor(batch.maskable, generator)
    stages = memdlm.make_stages(anchor, batch.maskable, own, generator)
    fast = memdlm.init_fast(model, own, own.sets(len(batch.x0)), generator)
    fast, _ = memdlm.inner_loop(model, batch, stages, fast, own)
    h = memdlm.embed(model, batch.x0, anchor.masked)
    h = model.run(h, 0, None, batch.attention_mask, fast, at=anchor.masked)
    nll = memdlm.token_nll(model, h, batch.x0[anchor.masked])
    return nll.sum() / anchor.masked.sum().clamp(min=1)
