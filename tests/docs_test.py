"""Every Python block of the Markdown pages runs."""

import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

ROOT = pathlib.Path(__file__).parents[1]
# The pieces of loops.md are not whole: tests/clients runs what they stand for.
PAGES = sorted(str(path.relative_to(ROOT))
               for path in (ROOT / 'docs').glob('*.md')
               if path.name != 'loops.md')


def python_blocks(name):
  text = (ROOT / name).read_text()
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


def run(block):
  names = {}
  exec(compile(block, '<block>', 'exec'), names)  # pylint: disable=exec-used
  return names


class DocsTest(parameterized.TestCase):

  @parameterized.parameters(*PAGES)
  def test_snippets_of_a_page_run_in_order(self, page):
    names = {}
    for block in python_blocks(page):
      exec(compile(block, page, 'exec'), names)  # pylint: disable=exec-used
    for name, value in names.items():
      if isinstance(value, sparse_jax.SparseMethod):
        self.assertNotEmpty(value.name, name)

  def test_the_readme_is_short(self):
    self.assertLessEqual(len((ROOT / 'README.md').read_text().split('\n')), 161)

  def test_readme_trains_in_linen_and_nnx(self):
    linen, nnx = python_blocks('README.md')
    summary = sparse_jax.summarize(
        *(run(linen)[name] for name in ('params', 'opt_state', 'method')))
    self.assertAlmostEqual(summary.sparsity, .9, places=2)
    optimizer = run(nnx)['optimizer']
    self.assertEqual(int(sparse_jax.get_state(optimizer).step), 3)

  def test_readme_changes_two_lines(self):
    linen, *_ = python_blocks('README.md')
    self.assertLen(re.findall(r'# line (one|two)', linen), 2)

  def test_method_of_the_workspace_page_runs_masked_and_packed(self):
    block, = python_blocks('WORKSPACE.md')
    self.assertLessEqual(len(block.strip().split('\n')), 18)
    method = run(block)['random_drop'](
        .75, update_every=2, structure=sparse_jax.Block((2, 2)))
    weights = {'kernel': jnp.arange(1., 97.).reshape(8, 12)}
    inputs, kept = jnp.ones((3, 8)), []
    for own in (method, sparse_jax.packed(method)):
      tx = sparse_jax.sparsify(optax.sgd(.1), own)
      params, state = sparse_jax.start(tx, own, weights)

      @jax.jit
      def step(params, state, own=own, tx=tx):
        grads = jax.grad(lambda params: jnp.sum(sparse_jax.with_method(
            lambda weights, x: x @ weights['kernel'], own, state)(
                params, inputs)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

      for _ in range(4):
        params, state = step(params, state)
      kept.append(sparse_jax.dense_weights(own, params, state)['kernel'])
      mask = sparse_jax.get_state(state).forward_masks['kernel']
      self.assertEqual(int(mask.sum()), 24)
    np.testing.assert_allclose(*kept, rtol=1e-5)

  def test_readme_lists_every_method(self):
    text = (ROOT / 'README.md').read_text()
    for name, value in vars(sparse_jax).items():
      returned = getattr(value, '__annotations__', {}).get('return')
      if returned is sparse_jax.SparseMethod:
        self.assertIn(f'`{name}', text)


if __name__ == '__main__':
  absltest.main()
