"""Live streams of events over HTTP: `ttr-gpu serve`. Needs the extra `serve`."""
