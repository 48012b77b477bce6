"""Necks for the plain backbone. They need torch alone; registered for OpenMMLab configs under their class names."""

from .simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["SimpleFeaturePyramid"]
