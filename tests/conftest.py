"""Tests run on eight CPU devices, with implicit rank promotion an error.

`--tier` chooses between the quick tests and the long ones (second_tier.py).
"""

import gc
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jaxlib  # noqa: E402

# Nearly all time goes into compiling, and half of that into optimising what
# runs for milliseconds. XLA ends the process at a flag that it does not know,
# so only where it is known.
if jaxlib.__version__.startswith('0.10.'):
  os.environ['XLA_FLAGS'] = ' '.join((
      '--xla_cpu_use_fusion_emitters=false',
      # Eight devices that share a busy core may wait long for each other.
      '--xla_cpu_collective_call_terminate_timeout_seconds=600',
      os.environ.get('XLA_FLAGS', '')))

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import second_tier  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)
# Programs are traced by the thousand; what they leave is seldom garbage.
jax.config.update('jax_traceback_in_locations_limit', 0)
gc.set_threshold(200_000, 20, 50)


def pytest_addoption(parser):
  parser.addoption(
      '--tier', choices=('first', 'second', 'all'),
      help='first: every law once (of the whole suite the default); second: '
      'the rest; all: both (the default where files are named)')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Leaves the tests of the tier that was asked for."""
  whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
  if whole:
    second_tier.check_all_found(items)
  tier = config.option.tier or ('first' if whole else 'all')
  if tier == 'all':
    return
  chosen = {True: [], False: []}
  for item in items:
    long = second_tier.is_long(item)
    chosen[long == (tier == 'second')].append(item)
  config.hook.pytest_deselected(items=chosen[False])
  items[:] = chosen[True]
