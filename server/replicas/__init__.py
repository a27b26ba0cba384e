"""Several engines behind one address: what stands at the door, and what each replica does.

Nothing here knows how replicas are started or found; `octavo/ray_serve.py` has Ray do that.
"""
