"""Model families: what each says of itself. Nothing outside the family files knows one."""
