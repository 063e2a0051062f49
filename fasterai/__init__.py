"Networks that are sparse, stay sparse, and profit from it."
__version__ = '0.1.0'
