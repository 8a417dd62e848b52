"""What must hold of every loop in the manner of others, with every method."""

from collections.abc import Callable
import contextlib
import math
import os
from typing import Any
from typing import NamedTuple
from unittest import mock

from absl.testing import parameterized
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import trees
from sparse_jax.blocks import packing
from sparse_jax.operators import injection

BLOCK = sparse_jax.Block((4, 4))
# Of the keywords of a loop (batch_axes, contracting, is_sparse) str_ takes
# those that it has.
METHODS = {
    'dense': lambda **sites: sparse_jax.dense(),
    'top_kast': lambda **sites: sparse_jax.top_kast(
        .5, backward_sparsity=.25, update_every=2, **sites),
    'rigl': lambda **sites: sparse_jax.rigl(.5, update_every=2, **sites),
    'swat': lambda **sites: sparse_jax.swat(
        .5, activation_sparsity=.75, **sites),
    'str_': lambda **sites: sparse_jax.str_(initial=-4., **{
        name: value for name, value in sites.items() if name != 'contracting'}),
    'packed_rigl': lambda **sites: sparse_jax.packed(sparse_jax.rigl(
        .5, update_every=2, structure=BLOCK, **sites)),
}


class Run(NamedTuple):
  """What a loop leaves behind."""

  losses: list[float]
  params: Any  # As the optimizer holds them.
  opt_state: Any
  programs: int  # How many the step was compiled to.
  updates: int  # Of the optimizer.
  # (fn of variables or params -> fn as the method computes it) -> outputs.
  evaluate: Callable[[Any, Any], jax.Array]
  average: Any = None  # What is evaluated in place of the parameters.


# The library's three lines. Without a method they are what stood there before.


def prepare(optimizer, method):
  """Where the optimizer was made."""
  return optimizer if method is None else sparse_jax.sparsify(optimizer, method)


def begin(tx, method, params):
  """Where `tx.init(params)` stood."""
  if method is None:
    return params, tx.init(params)
  return sparse_jax.start(tx, method, params)


def door(apply, method, opt_state, **options):
  """Where `model.apply` stood."""
  if method is None:
    return apply
  return sparse_jax.with_method(apply, method, opt_state, **options)


def nnx_begin(model, tx, method):
  """Where `nnx.Optimizer(model, tx, wrt=nnx.Param)` stood."""
  if method is None:
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)
  return sparse_jax.nnx_start(model, tx, method)


def nnx_door(model, method, optimizer):
  """Where `model` was called."""
  if method is None:
    return model
  return sparse_jax.nnx_getter(method, optimizer)(model)


def train_linen(model, method, optimizer, inputs, targets, steps, *, tx=None):
  """The Run of an ordinary loop on one batch."""
  tx = prepare(optimizer, method) if tx is None else tx
  params, opt_state = put(begin(tx, method, jax.jit(model.init)(
      jax.random.key(0), inputs)['params']))

  def step(params, opt_state):
    def loss_fn(params):
      outputs = door(model.apply, method, opt_state)(
          {'params': params}, inputs)
      return squared(outputs, targets)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  step, losses = jax.jit(step, **options(method)), []
  for _ in range(steps):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
  return Run(losses, params, opt_state, step._cache_size(), steps,
             lambda through, params: through(model.apply)(
                 {'params': params}, inputs))


def nnx_run(losses, model, optimizer, method, inputs, programs, updates):
  """The Run of an NNX model and its optimizer."""
  model.eval()
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def evaluate(through, weights):
    whole = nnx.State({**params, **weights})  # Less what nnx_start has added.
    return through(nnx.merge(graph, whole, rest, copy=True))(inputs)

  return Run(losses, params, optimizer, programs, updates, evaluate)


class LoopTest(parameterized.TestCase):
  """The laws of one loop: a subclass says how it trains.

  `train(self, method)` returns a Run, of the loop without the library where
  the method is None.
  """

  title = ''  # The rest is for docs/loops.md.
  recipe = ''
  sites = {}  # Keywords of the methods.
  refused = {}  # {method: what the error says}.
  still = {}  # {method: why nothing is learnt}.
  moves = True  # Whether masks are to have moved.
  traced = 1  # How often the update is traced.
  # Paths that SWAT's operators must reach; None: all sparse ones.
  reached = None

  def train(self, method) -> Run:
    raise NotImplementedError

  @parameterized.parameters(*METHODS)
  def test_every_law_holds_with(self, name):
    method = METHODS[name](**self.sites)
    if name in self.refused:
      with self.assertRaisesRegex(Exception, self.refused[name]):
        self.train(method)
      return
    counted, traces = count_updates(method)
    with seen_products() as seen:
      run = self.train(counted)
    self.assertTrue(np.all(np.isfinite(run.losses)), run.losses)
    if name in self.still:
      self.assertEqual(run.losses[-1], run.losses[0])
    else:
      self.assertLess(run.losses[-1], run.losses[0])
    self.assertLen(traces, self.traced)
    self.assertLessEqual(run.programs, 1)
    state = sparse_jax.get_state(run.opt_state)
    self.assertEqual(state.step, run.updates)
    self.check_counts(name, method, run, state)
    self.check_evaluation(method, run)
    if name == 'swat':
      self.assertEqual(seen, set(self.reached or state.plan.by_path))
    if name == 'dense':
      self.check_same(run, self.train(None))

  def check_counts(self, name, method, run, state):
    """In each slice exactly what was asked for, and something has moved."""
    if name == 'dense':
      self.assertEmpty(state.plan.leaves)
      return
    self.assertNotEmpty(state.plan.leaves)
    masks, backward, stored = (trees.leaves_by_path(tree) for tree in (
        state.forward_masks, state.backward_masks, run.params))
    weights = trees.leaves_by_path(sparse_jax.dense_weights(
        method, run.params, state))
    moved, shares = 0, []
    for leaf in state.plan.leaves:
      mask, layout = np.asarray(masks[leaf.path]), leaf.layout
      read = np.asarray(bare(weights[leaf.path])) != 0
      if name == 'str_':
        np.testing.assert_array_equal(read, mask)
        shares.append(mask.mean())
        continue
      self.assertFalse((read & ~mask).any())
      each = tuple(i for i in range(mask.ndim) if i not in layout.stacked)
      size = math.prod(mask.shape[i] for i in each)
      groups = layout.structure.shape if name == 'packed_rigl' else (1,)
      want = sparse_jax.keep_count(
          size // math.prod(groups), .5) * math.prod(groups)
      np.testing.assert_array_equal(mask.sum(each), want, leaf.path)
      if name == 'top_kast':
        np.testing.assert_array_equal(
            np.asarray(backward[leaf.path]).sum(each),
            sparse_jax.keep_count(size, .25))
      if name == 'packed_rigl':
        at = leaf.path if leaf.path in stored else f'{leaf.path}/blocks'
        self.assertEqual(bare(stored[at]).size,
                         math.prod(layout.group_shape) // 2 * math.prod(groups))
      moved += int((trees.leaves_by_path(state.marks)[leaf.path] & 4 > 0).sum(
          ) * math.prod(groups)) - int(mask.sum())
    if name == 'str_':
      self.assertBetween(np.mean(shares), .05, .999)
    elif self.moves:
      self.assertGreater(moved, 0)

  def check_evaluation(self, method, run):
    """Through the door it is the exported network, in the model as it was."""
    own = self.door(method, run.opt_state)
    held = run.params if run.average is None else run.average

    @jax.jit
    def both(params):
      weights = sparse_jax.dense_weights(method, params, run.opt_state)
      return run.evaluate(own, params), run.evaluate(lambda fn: fn, weights)

    through, exported = both(held)
    np.testing.assert_allclose(through, exported, atol=1e-5)

  def door(self, method, opt_state):
    """What a function is evaluated through; a model of NNX by the getter."""
    def through(fn):
      if isinstance(fn, nnx.Module):
        return nnx_door(fn, method, opt_state)
      return door(fn, method, opt_state)

    return through

  def check_same(self, run, other):
    """Bit for bit the run without the library."""
    self.assertEqual(run.losses, other.losses)
    assert_same(run.params, other.params)


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def bare(leaf):
  return leaf.blocks if packing.is_packed(leaf) else leaf


@contextlib.contextmanager
def seen_products():
  """The paths of the products that get a method's operators in this context."""
  seen, rule_of = set(), injection.rule_of

  def noting(*args, **kwargs):
    rule, paths = rule_of(*args, **kwargs)

    def noted(path, *operands):
      seen.add(path)
      return rule(path, *operands)

    return noted if rule else None, paths

  with mock.patch.object(injection, 'rule_of', noting):
    yield seen


def count_updates(method):
  """The method, and a list that gets an entry when its update is traced.

  A jitted step may say that it has 0 programs: XLA forgets some in a process
  that has compiled thousands.
  """
  traces = []

  def update(*args, **kwargs):
    traces.append(None)
    return method.update(*args, **kwargs)

  return method._replace(update=update), traces


def options(method):
  """Of `jax.jit`, where two programs are to agree bit for bit.

  conftest.py hurries XLA; the fusions of its hurry round one sum in two ways
  in two programs.
  """
  hurried = 'fusion_emitters=false' in os.environ.get('XLA_FLAGS', '')
  if not hurried or not (method is None or method.name == 'dense'):
    return {}
  return {'compiler_options': {'xla_cpu_use_fusion_emitters': True}}


def put(tree):
  """Committed to a device, as the outputs of a step are."""
  return jax.tree.map(lambda leaf: leaf if getattr(
      leaf, 'committed', False) else jax.device_put(leaf, jax.devices()[0]),
                      tree)


def squared(outputs, targets):
  return jnp.mean(jnp.square(outputs - targets))
