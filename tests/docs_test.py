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


def python_blocks(name):
  text = (ROOT / name).read_text()
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


def run(block):
  names = {}
  exec(compile(block, '<block>', 'exec'), names)  # pylint: disable=exec-used
  return names


class DocsTest(parameterized.TestCase):

  def test_readme_trains_in_linen_and_nnx(self):
    linen, nnx, *_ = python_blocks('README.md')
    summary = sparse_jax.summarize(
        *(run(linen)[name] for name in ('params', 'opt_state', 'method')))
    self.assertAlmostEqual(summary.sparsity, .9, places=2)
    optimizer = run(nnx)['optimizer']
    self.assertEqual(int(sparse_jax.get_state(optimizer).step), 3)

  def test_readme_trains_packed(self):
    *_, packed, _ = python_blocks('README.md')
    names = run(packed)
    self.assertEqual(names['state'].step, 3)
    weights, _ = sparse_jax.partition_packed(names['params'])
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    self.assertLess(count(weights), .25 * count(names['dense']))

  def test_readme_reads_masks_as_packed_weights(self):
    names = run(python_blocks('README.md')[-1])
    weights = names['method'].read(names['params'], names['opt_state'])
    outputs = names['model'].apply({'params': weights}, names['inputs'])
    np.testing.assert_allclose(
        names['loss'], jnp.mean((outputs - names['targets'])**2), rtol=1e-5)

  def test_readme_trains_with_sparse_activations(self):
    _, _, swat, *_ = python_blocks('README.md')
    names = run(swat)
    self.assertEqual(int(sparse_jax.get_state(names['opt_state']).step), 3)
    self.assertTrue(bool(jnp.isfinite(names['loss'])))

  def test_readme_changes_two_lines(self):
    linen, *_ = python_blocks('README.md')
    self.assertLen(re.findall(r'# line (one|two)', linen), 2)

  def test_method_of_the_workspace_page_reaches_its_sparsity(self):
    block, = python_blocks('WORKSPACE.md')
    method = run(block)['random_pruning'](.75, update_end=4, update_every=2)
    params = {'kernel': jnp.arange(1., 97.).reshape(8, 12)}
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    state, densities, seen = tx.init(params), [], jnp.ones((8, 12), bool)
    update = jax.jit(tx.update)
    for _ in range(4):
      updates, state = update(params, state, params)
      params = optax.apply_updates(params, updates)
      mask = sparse_jax.get_state(state).forward_masks['kernel']
      self.assertFalse(bool((mask & ~seen).any()), 'masks must nest')
      seen = mask
      densities.append(int((params['kernel'] != 0).sum()))
    self.assertEqual(densities[0], 96)
    self.assertLess(densities[1], 96)
    self.assertEqual(densities[3], 24)

  def test_readme_lists_every_method(self):
    text = (ROOT / 'README.md').read_text()
    for name, value in vars(sparse_jax).items():
      returned = getattr(value, '__annotations__', {}).get('return')
      if returned is sparse_jax.SparseMethod:
        self.assertIn(f'`{name}', text)


if __name__ == '__main__':
  absltest.main()
