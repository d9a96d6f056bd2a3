"""lens: text to image with dense captions, mixed resolutions and features of a language model (arXiv 2605.21573).

Read in this order: ``template`` and ``text_encoder`` (what the network is told), ``latents`` (what it works on),
``transformer`` (the network), ``checkpoints`` (its weights in the world), ``scheduler`` (how many steps, and how
noisy), ``guidance``, ``presets``, ``editing`` (pictures as a start) and ``pipeline``, then ``feature_cache`` and
``reasoner`` (what surrounds it). Training: ``curation`` and the files beside it (pictures to shards), ``captioning``
and its captioners, ``objectives`` (the loss).
"""
