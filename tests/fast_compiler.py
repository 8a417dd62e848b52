"""A compiler that remembers, for tests that start programs."""

import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

_CACHE = tempfile.TemporaryDirectory()
SETTINGS = {'jax_disable_most_optimizations': True,
            'jax_compilation_cache_dir': _CACHE.name,
            'jax_persistent_cache_min_compile_time_secs': 0.,
            'jax_persistent_cache_min_entry_size_bytes': -1}
_USUAL = {'jax_compilation_cache_dir': None,
          'jax_persistent_cache_min_compile_time_secs': 1.,
          'jax_persistent_cache_min_entry_size_bytes': 0}


def use():
  """For `setUpModule`."""
  _configure(SETTINGS)


def leave():
  """For `tearDownModule`."""
  _configure(_USUAL)


def _configure(settings):
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # Else it keeps the folder of its first use.
