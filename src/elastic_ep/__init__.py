"""elastic_ep: mixture-of-experts serving in which the death of any rank is a normal event."""
