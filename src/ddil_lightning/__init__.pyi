from ddil_lightning.backbones.adapters import Adapter as Adapter
from ddil_lightning.backbones.network import Network as Network
from ddil_lightning.backbones.interface import Backbone as Backbone
from ddil_lightning.backbones.pipeline import Pipeline as Pipeline
from ddil_lightning.backbones.roles import Role as Role
from ddil_lightning.backbones.source import Lora as Lora, Source as Source
from ddil_lightning.callbacks import AnnealPrior as AnnealPrior, Cadence as Cadence, Checkpoints as Checkpoints, FlushBuffer as FlushBuffer, Previews as Previews, Progress as Progress, ShiftProbe as ShiftProbe, Stages as Stages, Validation as Validation
from ddil_lightning.commands.assembly import assemble as assemble
from ddil_lightning.data.buckets import Buckets as Buckets
from ddil_lightning.data.captions import Captions as Captions, Digits as Digits, Images as Images, Prompts as Prompts, Shapes as Shapes
from ddil_lightning.data.datamodule import DDILDataModule as DDILDataModule
from ddil_lightning.diffusion.denoiser import Boundary as Boundary, Denoiser as Denoiser
from ddil_lightning.diffusion.losses import Distance as Distance, mse as mse
from ddil_lightning.diffusion.policy import Policies as Policies, Policy as Policy
from ddil_lightning.diffusion.reflection import Reflection as Reflection
from ddil_lightning.diffusion.grid import Grid as Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule as NoiseSchedule
from ddil_lightning.diffusion.transitions import Transition as Transition, ddim as ddim, renoise as renoise
from ddil_lightning.evaluation.columns import Column as Column
from ddil_lightning.evaluation.metrics.base import Metric as Metric
from ddil_lightning.imitation.buffer import ReplayBuffer as ReplayBuffer
from ddil_lightning.imitation.options import Buffer as Buffer, Rollouts as Rollouts
from ddil_lightning.imitation.prior import Cosine as Cosine, Exponential as Exponential, Gated as Gated, GatedBy as GatedBy, Linear as Linear, Piecewise as Piecewise, SamplingPrior as SamplingPrior, Schedule as Schedule
from ddil_lightning.imitation.rollout import draw as draw, roll as roll
from ddil_lightning.feed import Feed as Feed, Pairs as Pairs, Wants as Wants
from ddil_lightning.methods import ADD as ADD, BOOT as BOOT, CTM as CTM, DMD as DMD, DMD2 as DMD2, EMD as EMD, ImagineFlash as ImagineFlash, LADD as LADD, LCM as LCM, MomentMatching as MomentMatching, PCM as PCM, PD as PD, Reflow as Reflow, SiD as SiD, SnapFusion as SnapFusion, TCD as TCD, UFOGen as UFOGen
from ddil_lightning.methods.dmd2 import Matching as Matching
from ddil_lightning.methods.emd import Chain as Chain
from ddil_lightning.methods.imagine_flash import Shift as Shift
from ddil_lightning.records import Context as Context, LatentBatch as LatentBatch
from ddil_lightning.streams import Streams as Streams
from ddil_lightning.training.adversary import Adversary as Adversary, Critic as Critic
from ddil_lightning.training.gan import Gan as Gan, LogitNormal as LogitNormal
from ddil_lightning.training.scores import Normalised as Normalised, Reflects as Reflects, Scores as Scores
from ddil_lightning.training.vision import BuiltinVision as BuiltinVision, Dino as Dino, Vision as Vision
from ddil_lightning.training.deployment import Deployment as Deployment
from ddil_lightning.training.options import Memory as Memory
from ddil_lightning.training.method import Distillation as Distillation
from ddil_lightning.training.optimisation import Optimizer as Optimizer
from ddil_lightning.training.regression import Regression as Regression
from ddil_lightning.training.plan import Part as Part, Stage as Stage
