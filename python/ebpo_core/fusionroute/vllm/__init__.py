"""FusionRoute (arXiv 2601.05106) served by vLLM, and the client's side of it.

:mod:`.plugin` is vLLM's entry point, :mod:`.client` reads a server's answers token by token. Importing this imports
neither vLLM nor torch.
"""
