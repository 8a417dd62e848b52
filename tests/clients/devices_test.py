"""Eight devices: shard_map, a mesh with explicit axes, jax.pmap."""

import functools

from absl.testing import absltest
from flax import jax_utils
import flax.linen as nn
import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import optax

from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))
STEPS = 6
OPTIMIZER = optax.adam(.02)


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


def first(tx, method):
  return laws.begin(tx, method, Net().init(jax.random.key(0),
                                           INPUTS)['params'])


def make_step(tx, method, axis=None, **options):
  """A step on the examples of one device, or of all of them."""
  def step(params, opt_state, inputs, targets):
    def loss_fn(params):
      outputs = laws.door(Net().apply, method, opt_state, **options)(
          {'params': params}, inputs)
      return laws.squared(outputs, targets)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    if axis:
      loss, grads = lax.pmean((loss, grads), axis)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step


def run_of(losses, params, opt_state, programs):
  return laws.Run(losses, params, opt_state, programs, STEPS,
                  lambda through, params: through(Net().apply)(
                      {'params': params}, INPUTS))


def repeat(step, state, batch):
  losses = []
  for _ in range(STEPS):
    *state, loss = step(*state, *batch)
    losses.append(float(loss.ravel()[0]))
  return losses, *state


class ShardMapTest(laws.LoopTest):

  title = 'shard_map: a step with pmean'
  recipe = """
  ```python
  step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P('data')),
                       out_specs=P(), check_vma=False)
  ```

  `with_method` and `tx.update` stand inside, gradients pass `lax.pmean` before
  the update, and every device draws the same masks.
  """

  def train(self, method):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    tx = laws.prepare(OPTIMIZER, method)
    whole, rows = PartitionSpec(), PartitionSpec('data')
    # Varying parameters would have their gradients summed by JAX itself.
    step = jax.shard_map(make_step(tx, method, 'data'), mesh=mesh,
                         in_specs=(whole, whole, rows, rows),
                         out_specs=whole, check_vma=False)
    step = jax.jit(step, **laws.options(method))
    state = jax.device_put(first(tx, method), NamedSharding(mesh, whole))
    batch = jax.device_put((INPUTS, TARGETS), NamedSharding(mesh, rows))
    return run_of(*repeat(step, state, batch), step._cache_size())


class ExplicitTest(laws.LoopTest):
  """Each of eight devices packs the activations that it has, of SWAT."""

  title = 'A mesh with explicit axes'
  recipe = """
  ```python
  with jax.set_mesh(mesh):
    apply = sparse_jax.with_method(model.apply, method, opt_state,
                                   activation_scope=8)  # Of SWAT, 8 devices.
  ```

  Masks are chosen on automatic axes inside, and laid like their weights.
  """

  def train(self, method):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Explicit,))
    tx = laws.prepare(OPTIMIZER, method)
    with jax.set_mesh(mesh):
      step = jax.jit(make_step(tx, method, activation_scope=8),
                     **laws.options(method))
      state = jax.device_put(first(tx, method), NamedSharding(
          mesh, PartitionSpec()))
      # One layout can be written in two ways; now as a step writes it.
      state = jax.jit(lambda *trees: trees)(*state)
      batch = jax.device_put((INPUTS, TARGETS), NamedSharding(
          mesh, PartitionSpec('data')))
      losses, *state = repeat(step, state, batch)
    state = laws.put(state)
    return run_of(losses, *state, step._cache_size())


class PmapTest(laws.LoopTest):

  title = 'jax.pmap with replicate and pmean'
  traced = 2  # As without the library: pmap lays its own outputs otherwise.
  recipe = """
  ```python
  state = jax_utils.replicate(sparse_jax.start(tx, method, params))
  step = jax.pmap(step, axis_name='batch')  # lax.pmean of the gradients inside.
  state = jax_utils.unreplicate(state)  # For evaluation.
  ```
  """

  def train(self, method):
    tx = laws.prepare(OPTIMIZER, method)
    step = make_step(tx, method, 'batch')
    traces = []

    @functools.partial(jax.pmap, axis_name='batch')
    def counted(*args):
      traces.append(1)
      return step(*args)

    replicated = jax_utils.replicate(first(tx, method))
    batch = [data.reshape(8, 2, -1) for data in (INPUTS, TARGETS)]
    # Two programs, with the library or without: pmap lays its own outputs
    # otherwise than `replicate` does.
    *state, _ = counted(*replicated, *batch)
    counted(*state, *batch)
    first_traces = len(traces)
    losses, *state = repeat(counted, replicated, batch)
    for copy in range(1, 8):
      laws.assert_same(*(jax.tree.map(lambda leaf: leaf[at], state)
                         for at in (0, copy)))
    state = jax_utils.unreplicate(state)
    return run_of(losses, *state, 1 + len(traces) - first_traces)


if __name__ == '__main__':
  absltest.main()
