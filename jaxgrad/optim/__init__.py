"""Optimizers by hand, in the optax protocol, and the same rules as optax chains.

Every rule takes ``numerics="exact"`` (the default) or ``"optax"``, which gives the bits of its
twin in `chains` under one jit.
"""

from jaxgrad.optim import chains as chains
from jaxgrad.optim.accumulation import accumulate as accumulate
from jaxgrad.optim.accumulation import has_updated as has_updated
from jaxgrad.optim.adaptive import adagrad as adagrad
from jaxgrad.optim.adaptive import adam as adam
from jaxgrad.optim.adaptive import adamw as adamw
from jaxgrad.optim.adaptive import rmsprop as rmsprop
from jaxgrad.optim.averaging import schedule_free_adamw as schedule_free_adamw
from jaxgrad.optim.averaging import schedule_free_eval_params as schedule_free_eval_params
from jaxgrad.optim.clipping import adaptive_clip as adaptive_clip
from jaxgrad.optim.clipping import clip_by_block_rms as clip_by_block_rms
from jaxgrad.optim.clipping import clip_by_global_norm as clip_by_global_norm
from jaxgrad.optim.clipping import clip_by_value as clip_by_value
from jaxgrad.optim.composition import add_decayed_weights as add_decayed_weights
from jaxgrad.optim.composition import chain as chain
from jaxgrad.optim.composition import compiler_options as compiler_options
from jaxgrad.optim.composition import flat as flat
from jaxgrad.optim.composition import inject_hyperparams as inject_hyperparams
from jaxgrad.optim.composition import pack as pack
from jaxgrad.optim.composition import unpack as unpack
from jaxgrad.optim.descent import lion as lion
from jaxgrad.optim.descent import momentum as momentum
from jaxgrad.optim.descent import nesterov as nesterov
from jaxgrad.optim.descent import sgd as sgd
from jaxgrad.optim.factored import adafactor as adafactor
from jaxgrad.optim.guards import apply_if_finite as apply_if_finite
from jaxgrad.optim.guards import dynamic_loss_scale as dynamic_loss_scale
from jaxgrad.optim.guards import loss_scale as loss_scale
from jaxgrad.optim.orthogonal import muon as muon
from jaxgrad.optim.schedules import constant as constant
from jaxgrad.optim.schedules import inverse_sqrt as inverse_sqrt
from jaxgrad.optim.schedules import warmup_constant as warmup_constant
from jaxgrad.optim.schedules import warmup_cosine as warmup_cosine
from jaxgrad.optim.schedules import warmup_linear as warmup_linear
from jaxgrad.optim.schedules import warmup_stable_decay as warmup_stable_decay

# name -> (by hand, optax chain). Each takes one number; accumulate, apply_if_finite and the
# schedules have twins in `chains` too, with their own signatures.
TWINS = {
    "sgd": (sgd, chains.sgd),
    "momentum": (momentum, chains.momentum),
    "nesterov": (nesterov, chains.nesterov),
    "adam": (adam, chains.adam),
    "adamw": (adamw, chains.adamw),
    "lion": (lion, chains.lion),
    "rmsprop": (rmsprop, chains.rmsprop),
    "adagrad": (adagrad, chains.adagrad),
    "adafactor": (adafactor, chains.adafactor),
    "muon": (muon, chains.muon),
    "schedule_free_adamw": (schedule_free_adamw, chains.schedule_free_adamw),
    "clip_by_value": (clip_by_value, chains.clip_by_value),
    "clip_by_global_norm": (clip_by_global_norm, chains.clip_by_global_norm),
    "clip_by_block_rms": (clip_by_block_rms, chains.clip_by_block_rms),
    "adaptive_clip": (adaptive_clip, chains.adaptive_clip),
    "add_decayed_weights": (add_decayed_weights, chains.add_decayed_weights),
}
