"""Merging: `name(base, experts, *, hyperparameters) -> dict[str, Tensor]`; one method, one file."""

from notebook_kit.merging.adamerging import AdaMergingPath, adamerging, adamerging_path
from notebook_kit.merging.average import average
from notebook_kit.merging.breadcrumbs import breadcrumbs
from notebook_kit.merging.checkpoints import CheckpointRecorder, average_checkpoints
from notebook_kit.merging.consensus import consensus
from notebook_kit.merging.continual import continual
from notebook_kit.merging.dare import dare
from notebook_kit.merging.della import della
from notebook_kit.merging.diagonal_fisher import diagonal_fisher
from notebook_kit.merging.doge import doge
from notebook_kit.merging.doge_inside import doge_details, doge_experts
from notebook_kit.merging.evolution import cma_es, map_elites, slerp_search
from notebook_kit.merging.fisher import fisher
from notebook_kit.merging.flat_space import FlatSpace
from notebook_kit.merging.frank_wolfe import FrankWolfePath, frank_wolfe, frank_wolfe_path
from notebook_kit.merging.graft import fast_fisher_graft, graft_masks
from notebook_kit.merging.graft_search import graft_density
from notebook_kit.merging.grams import gram_matrices
from notebook_kit.merging.greedy_soup import greedy_ingredients, greedy_soup
from notebook_kit.merging.isotropic import isotropic
from notebook_kit.merging.karcher import karcher
from notebook_kit.merging.lora_products import average_products, lora_pairs, product_of_pairs
from notebook_kit.merging.m2n2 import m2n2
from notebook_kit.merging.masked_experts import MaskedExperts
from notebook_kit.merging.metrics_weighted import checkpoint_weights, metrics_weighted, select_checkpoints
from notebook_kit.merging.model_stock import model_stock
from notebook_kit.merging.moments import compress_moment, restore_moment, squared_gradients, stored_numbers
from notebook_kit.merging.niche_archive import NicheArchive
from notebook_kit.merging.opcm import opcm
from notebook_kit.merging.opcm_stream import Opcm
from notebook_kit.merging.ota import ota
from notebook_kit.merging.pcb import pcb
from notebook_kit.merging.pcb_scores import PcbScores, pcb_scores
from notebook_kit.merging.pcb_search import PcbSearch, pcb_search
from notebook_kit.merging.point_scores import PointScores, random_weights
from notebook_kit.merging.regmean import regmean
from notebook_kit.merging.sce import sce
from notebook_kit.merging.slerp import slerp
from notebook_kit.merging.tall_masks import choose_thresholds, magnitude_masks, tall_masks
from notebook_kit.merging.task_arithmetic import task_arithmetic
from notebook_kit.merging.task_singular_vectors import task_singular_vectors
from notebook_kit.merging.ties import ties
from notebook_kit.merging.weight_search import search_weights
from notebook_kit.weights import IncompatibleWeights, check, load, merge_files, preflight, save, task_vector

__all__ = [
    "AdaMergingPath",
    "CheckpointRecorder",
    "FlatSpace",
    "FrankWolfePath",
    "IncompatibleWeights",
    "MaskedExperts",
    "NicheArchive",
    "Opcm",
    "PcbScores",
    "PcbSearch",
    "PointScores",
    "adamerging",
    "adamerging_path",
    "average",
    "average_checkpoints",
    "average_products",
    "breadcrumbs",
    "check",
    "checkpoint_weights",
    "choose_thresholds",
    "cma_es",
    "compress_moment",
    "consensus",
    "continual",
    "dare",
    "della",
    "diagonal_fisher",
    "doge",
    "doge_details",
    "doge_experts",
    "fast_fisher_graft",
    "fisher",
    "frank_wolfe",
    "frank_wolfe_path",
    "graft_density",
    "graft_masks",
    "gram_matrices",
    "greedy_ingredients",
    "greedy_soup",
    "isotropic",
    "karcher",
    "load",
    "lora_pairs",
    "m2n2",
    "magnitude_masks",
    "map_elites",
    "merge_files",
    "metrics_weighted",
    "model_stock",
    "opcm",
    "ota",
    "pcb",
    "pcb_scores",
    "pcb_search",
    "preflight",
    "product_of_pairs",
    "random_weights",
    "regmean",
    "restore_moment",
    "save",
    "sce",
    "search_weights",
    "select_checkpoints",
    "slerp",
    "slerp_search",
    "squared_gradients",
    "stored_numbers",
    "tall_masks",
    "task_arithmetic",
    "task_singular_vectors",
    "task_vector",
    "ties",
]
