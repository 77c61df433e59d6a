"""The model, as one rank of a worker runs it: the only package that imports torch.

One folder per concern: memory, sampling, attention, layers, loading, kernels, architectures, execution;
each imports only those before it. Only workers import this package, and only when they load a model.

Some state is the process's, not a rank's. Two engines whose workers are threads of one process share it:

* the number of PyTorch's threads (`torch.set_num_threads`), set by `execution.rank`: by ``cpu_threads``, to
  one while weights load, and to one for good where ullm's own CPU kernels compute;
* the thread pool of those kernels (``kernels/cpu/pool.h``), sized by the last model that was loaded; steps of
  two engines at the same time do not wait for each other, one of them computes without helpers;
* the current CUDA device (`torch.cuda.set_device`), set by `execution.rank`, and PyTorch's memory allocator;
* with tensor parallelism, torch.distributed's default process group, opened by `layers.parallel`: a process
  can hold one rank of one such replica;
* attention functions named ``ullm_paged`` and ``ullm_recording`` in transformers' registries, added by
  `architectures.transformers_model`. They hold no state: each call brings its own batch along;
* transformers' log level and progress bars, which are set and reset while a model loads through it.
"""
