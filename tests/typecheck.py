"""The type checker that the import hook of conftest.py puts around every function of the kit."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
