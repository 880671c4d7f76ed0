"""How fast a tunnel is, against other ways to do the same, all on loopback and in one run.

`targets` are the services at the far end, `systems` the ways to reach them, `visitors` the loads that this
process makes itself, `programs` those that others make. `scenes` puts these together into what is measured,
`rounds` runs them in rotation, `results` turns rounds into medians and ratios, `report` and `picture` show
them. Run it with `python -m benchmarks`.
"""
