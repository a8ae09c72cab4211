{{/*
What every pod of this chart has. The restricted Pod Security Standard, with a read-only root and whatever user id the image or the cluster gives.
*/}}

{{- define "shardmesh.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- /* OpenShift assigns a group, and refuses one that is asked for. */}}
{{- if and .Values.fsGroup (not (.Capabilities.APIVersions.Has "security.openshift.io/v1")) }}
fsGroup: {{ .Values.fsGroup }}
# A volume whose root has the group already is not walked through at each start.
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end -}}

{{- define "shardmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
{{- end -}}

{{/*
What a pod's values say of where it runs, and with which pull secrets; nothing if they say nothing. A claim that one node at a time may have keeps all
pods that mount it together: the scheduler knows nothing of that limit, and without this the second pod would wait for the volume for ever.
Call: include "shardmesh.scheduling" (list . COMPONENT MOUNTS), MOUNTS being whether the pod mounts the model's claim.
*/}}
{{- define "shardmesh.scheduling" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := get $root.Values $component -}}
{{- $spec := dict -}}
{{- range $key := list "nodeSelector" "tolerations" "priorityClassName" "runtimeClassName" -}}
{{- with get $values $key }}{{ $_ := set $spec $key . }}{{ end -}}
{{- end -}}
{{- $affinity := deepCopy $values.affinity -}}
{{- if and (index . 2) (eq $root.Values.model.claim.accessMode "ReadWriteOnce") -}}
{{- $labels := dict "matchLabels" (include "shardmesh.mountsLabels" $root | fromYaml) -}}
{{- $pods := get $affinity "podAffinity" | default dict -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $terms := append (get $pods $key | default list) (dict "topologyKey" "kubernetes.io/hostname" "labelSelector" $labels) -}}
{{- $_ := set $affinity "podAffinity" (set $pods $key $terms) -}}
{{- end -}}
{{- with $affinity }}{{ $_ := set $spec "affinity" . }}{{ end -}}
{{- $secrets := list -}}
{{- range $root.Values.image.pullSecrets }}{{ $secrets = append $secrets (dict "name" .) }}{{ end -}}
{{- with $secrets }}{{ $_ := set $spec "imagePullSecrets" . }}{{ end -}}
{{- with $spec }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* topologySpreadConstraints of a component, each counting the component's own pods. Call: include "shardmesh.spread" (list . COMPONENT) */}}
{{- define "shardmesh.spread" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $selector := dict "matchLabels" (include "shardmesh.selector" (list $root $component) | fromYaml) -}}
{{- $constraints := list -}}
{{- range (get $root.Values $component).topologySpreadConstraints -}}
{{- $constraints = append $constraints (merge (dict) . (dict "labelSelector" $selector)) -}}
{{- end -}}
{{- with $constraints }}{{ toYaml (dict "topologySpreadConstraints" .) }}{{ end -}}
{{- end -}}

{{/* The two places where a pod may write. */}}
{{- define "shardmesh.scratchVolumes" -}}
- name: cache
  emptyDir:
    {{- with .Values.cacheSize }}
    sizeLimit: {{ . }}
    {{- else }} {}
    {{- end }}
- name: tmp
  emptyDir: {}
{{- end -}}

{{- define "shardmesh.scratchMounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
{{- end -}}

{{/* The root is read-only and the user id may be any: whatever a library caches goes to /cache. */}}
{{- define "shardmesh.environment.data" -}}
HOME: /cache
XDG_CACHE_HOME: /cache
HF_HOME: /cache/huggingface
TRITON_CACHE_DIR: /cache/triton
TORCHINDUCTOR_CACHE_DIR: /cache/inductor
HF_HUB_DISABLE_TELEMETRY: "1"
{{- end -}}

{{- define "shardmesh.environment" -}}
envFrom:
  - configMapRef:
      name: {{ include "shardmesh.name" (list . "environment") }}
{{- end -}}

{{/*
A probe of the plaintext health port, which kubelet can ask while mutual TLS guards the others. Call: include "shardmesh.probe" (list . SERVICE),
where the service "" means that the process answers.
*/}}
{{- define "shardmesh.probe" -}}
{{- $root := index . 0 -}}
{{- $service := index . 1 -}}
{{- if semverCompare ">=1.24-0" $root.Capabilities.KubeVersion.Version -}}
grpc:
  port: {{ include "shardmesh.port.health" $root }}
  {{- with $service }}
  service: {{ . }}
  {{- end }}
{{- else -}}
# Kubernetes before 1.24 has no gRPC probes.
exec:
  command:
    - python
    - -c
    - >-
      import sys, grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc;
      stub = rpc.HealthStub(grpc.insecure_channel(sys.argv[1]));
      sys.exit(stub.Check(pb.HealthCheckRequest(service=sys.argv[2]), timeout=4).status != pb.HealthCheckResponse.SERVING)
    - 127.0.0.1:{{ include "shardmesh.port.health" $root }}
    - {{ $service | quote }}
{{- end }}
timeoutSeconds: 5
{{- end -}}

{{- define "shardmesh.tlsVolume" -}}
- name: tls
  secret:
    secretName: {{ . }}
    # The group's, which is fsGroup.
    defaultMode: 0440
{{- end -}}
