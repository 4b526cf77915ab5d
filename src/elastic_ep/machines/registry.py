from elastic_ep.messages import to_plain
def arguments(m, p, r):
    return {"membership": {"num_ranks": m.num_ranks, "placement": to_plain(m.placement), "config": to_plain(m.config)}, "progress": {"config": to_plain(p.config)}, "routing": {"config": to_plain(r.config)}}
