"""Assertions for a user's own test suite; their messages say what was measured."""

from jaxgrad.checks.accumulating import assert_accumulates as assert_accumulates
from jaxgrad.checks.flowing import assert_gradients_flow as assert_gradients_flow
from jaxgrad.checks.updates import assert_clips_before_update as assert_clips_before_update
from jaxgrad.checks.updates import assert_same_updates as assert_same_updates
from jaxgrad.optim.order import clip_order as clip_order
