"""Orbax: restored into an abstract state, a run goes on as if unbroken."""

import shutil
import tempfile

from absl.testing import absltest
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import sparse_jax
from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))
STEPS, SAVED = 8, 3  # Between two refreshes, so that the masks are old ones.


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


class RestoreTest(laws.LoopTest):

  title = 'Orbax: restored into an abstract state'
  recipe = """
  ```python
  shapes = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                               sharding=place),
      jax.eval_shape(init), jax.jit(init).lower().compile().output_shardings)
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder, shapes)
  ```

  `init` calls `sparse_jax.start`. The run goes on as if unbroken, bit for bit;
  Top-KAST's reservoir comes back into host memory.
  """

  def train(self, method):
    model, tx = Net(), laws.prepare(optax.adam(.02), method)

    def init():
      params, opt_state = laws.begin(
          tx, method, model.init(jax.random.key(0), INPUTS)['params'])
      return train_state.TrainState(jnp.int32(0), model.apply, params, tx,
                                    opt_state)

    def step(state):
      def loss_fn(params):
        outputs = laws.door(model.apply, method, state.opt_state)(
            {'params': params}, INPUTS)
        return laws.squared(outputs, TARGETS)

      loss, grads = jax.value_and_grad(loss_fn)(state.params)
      return state.apply_gradients(grads=grads), loss

    step = jax.jit(step, **laws.options(method))
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)

    def run(state, steps, losses, save_at=None):
      for count in range(1, steps + 1):
        state, loss = step(state)
        losses.append(float(loss))
        if count == save_at:
          with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(f'{folder}/state', state)
      return state

    losses = []
    unbroken = run(laws.put(init()), STEPS, losses, SAVED)
    # Nothing is allocated: shapes, and where a compiled start would put them.
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                 sharding=place),
        jax.eval_shape(init), jax.jit(init).lower().compile().output_shardings)
    with ocp.StandardCheckpointer() as checkpointer:
      state = checkpointer.restore(f'{folder}/state', shapes)
    again = []
    state = run(state, STEPS - SAVED, again)
    self.assertEqual(again, losses[SAVED:])
    self.assertEqual(jax.tree.structure(state), jax.tree.structure(unbroken))
    laws.assert_same(state, unbroken)
    return laws.Run(losses, state.params, state.opt_state, step._cache_size(),
                    STEPS, lambda through, params: through(model.apply)(
                        {'params': params}, INPUTS))

  def test_reservoir_in_host_memory_is_restored_there(self):
    method = sparse_jax.packed(sparse_jax.top_kast(
        .75, backward_sparsity=.5, update_every=2, structure=laws.BLOCK))
    state = sparse_jax.get_state(self.train(method).opt_state)
    for place in state.packed.values():
      self.assertEqual(place.reservoir.sharding.memory_kind, 'pinned_host')


if __name__ == '__main__':
  absltest.main()
