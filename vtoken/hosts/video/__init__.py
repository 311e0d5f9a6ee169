"""transformers' video models: frames that get a budget of tokens. `VideoAdapter` is what one's own family inherits."""

from vtoken.hosts.video.adapter import VideoAdapter as VideoAdapter
