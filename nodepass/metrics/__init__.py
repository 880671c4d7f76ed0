"""The metrics endpoint: what operators' programs request over HTTP."""
