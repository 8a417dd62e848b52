"""Tests run on eight CPU devices, with implicit rank promotion an error."""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jaxlib  # noqa: E402

# Nearly all time goes into compiling, and half of that into optimising what
# runs for milliseconds. XLA ends the process at a flag that it does not know,
# so only where it is known.
if jaxlib.__version__.startswith('0.10.'):
  os.environ['XLA_FLAGS'] = ' '.join((
      '--xla_cpu_use_fusion_emitters=false', os.environ.get('XLA_FLAGS', '')))

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)
