"""Packed storage on eight devices makes the run of one, and moves little."""

import contextlib
import functools
import importlib.util
import os
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

P = jax.sharding.PartitionSpec
AXES = {'auto': jax.sharding.AxisType.Auto,
        'explicit': jax.sharding.AxisType.Explicit}
BLOCK = sparse_jax.Block((4, 4))
BALANCED = sparse_jax.Block((4, 4), balanced=True)
METHODS = {
    'rigl': sparse_jax.rigl(.5, structure=BLOCK, update_every=2),
    'top_kast': sparse_jax.top_kast(.75, backward_sparsity=.5,
                                    structure=BLOCK, update_every=2)}
COLUMNS = sparse_jax.rigl(.5, structure=BALANCED, update_every=2)
SIZES = {'a': (16, 32), 'b': (32, 16)}


def model(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def problem():
  """The parameters and the batch."""
  keys = jax.random.split(jax.random.key(0), 3)
  return {name: jax.random.normal(key, SIZES[name])
          for name, key in zip(SIZES, keys[1:])}, jax.random.normal(
              keys[0], (16, 16))


def placed(mesh, kind):
  """Where leaves of the state lie: 'data', 'fsdp', 'columns'."""
  at = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
  axis = {'data': None, 'fsdp': 'data', 'columns': 'model'}[kind]

  def place(path, leaf):
    if getattr(path[-1], 'name', '') == 'reservoir':
      return at().with_memory_kind('pinned_host')
    split = axis and leaf.ndim == 3 and leaf.shape[0] % mesh.shape[axis] == 0
    return at(axis) if split else at()

  return lambda tree: jax.tree.map_with_path(place, tree)


def mesh_of(kind, axes='auto'):
  shape = {'data': 4, 'model': 2} if kind == 'columns' else {'data': 8}
  return jax.make_mesh(tuple(shape.values()), tuple(shape),
                       axis_types=(AXES[axes],) * len(shape))


def stepper(method, tx, **options):
  def step(state, x):
    params, opt_state = state

    def loss_fn(params):
      apply = sparse_jax.with_method(model, method, opt_state, **options)
      return jnp.mean(jnp.square(apply(params, x) - 1))

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  return step


def train(method, kind='one', axes='auto', context=False):
  """Weights and loss after five steps, where blocks lie, programs compiled."""
  params, x = problem()
  tx = sparse_jax.sparsify(optax.adam(.01), method)
  state = sparse_jax.start(tx, method, params)
  options, own, mesh = {}, {}, None
  if kind != 'one':
    mesh = mesh_of(kind, axes)
    places = placed(mesh, kind)(state)
    whole = jax.sharding.NamedSharding(mesh, P())
    rows = jax.sharding.NamedSharding(mesh, P('data'))
    state, x = jax.device_put(state, places), jax.device_put(x, rows)
    options = dict(out_shardings=(places, whole))
    if kind == 'columns' and axes == 'auto':
      own = dict(column_axes=('model',))
  with jax.set_mesh(mesh) if context else contextlib.nullcontext():
    step = jax.jit(stepper(method, tx, **own), **options)
    for _ in range(5):
      state, loss = step(state, x)
  blocks = getattr(state[0]['a'], 'blocks', None)
  return (sparse_jax.dense_weights(method, *jax.device_get(state)),
          float(loss), blocks is not None and blocks.sharding,
          step._cache_size())


@functools.cache
def masked(method):
  return train(method)[:2]


class DevicesTest(parameterized.TestCase):

  def check(self, method, kind, axes, context):
    want, want_loss = masked(method)
    got, loss, place, compiled = train(sparse_jax.packed(method), kind, axes,
                                       context)
    self.assertAlmostEqual(loss, want_loss, delta=1e-4)
    for path, weight in want.items():
      np.testing.assert_allclose(got[path], weight, atol=1e-5)
    self.assertEqual(compiled, 1)
    self.assertEqual(place.spec, {'data': P(), 'fsdp': P('data'),
                                  'columns': P('model')}[kind])

  @parameterized.product(name=list(METHODS), kind=['data', 'fsdp'],
                         mesh=['bare', 'auto', 'explicit'])
  def test_run_is_the_masked_one(self, name, kind, mesh):
    """Without `set_mesh`, and with one of automatic and explicit axes."""
    self.check(METHODS[name], kind, 'auto' if mesh == 'bare' else mesh,
               mesh != 'bare')

  @parameterized.parameters('bare', 'auto', 'explicit')
  def test_columns_over_devices(self, mesh):
    self.check(COLUMNS, 'columns', 'auto' if mesh == 'bare' else mesh,
               mesh != 'bare')


if __name__ == '__main__':
  absltest.main()
