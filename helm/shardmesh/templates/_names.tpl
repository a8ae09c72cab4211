{{/*
Names, labels and ports: whatever two resources must spell alike.
*/}}

{{/*
Name of a resource: RELEASE-COMPONENT, at most 52 characters, because controllers add up to 11 to the names of Jobs and pods and 63 is the end.
Call: include "shardmesh.name" (list . "worker").

A release's name that is too long, holds a dot or begins with a digit (Services allow neither) is changed, and then carries a hash of the
whole: two releases never share a resource. For the same reason no component's name ends with a dash and another component's name.
*/}}
{{- define "shardmesh.name" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $given := $root.Values.fullnameOverride | default $root.Release.Name -}}
{{- $room := int (sub 51 (len $component)) -}}
{{- $base := $given | replace "." "-" -}}
{{- if regexMatch "^[0-9]" $base -}}
{{- $base = printf "m-%s" $base -}}
{{- end -}}
{{- if or (ne $base $given) (gt (len $base) $room) -}}
{{- $base = printf "%s-%s" ($base | trunc (int (sub $room 9)) | trimSuffix "-") ($given | sha256sum | trunc 8) -}}
{{- end -}}
{{- printf "%s-%s" $base $component -}}
{{- end -}}

{{/* What selects the pods of a component, in this release only. Never changes: selectors are immutable. */}}
{{- define "shardmesh.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Of pods. Without versions: an upgrade that changes nothing else starts no pod anew. */}}
{{- define "shardmesh.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "shardmesh.selector" . }}
app.kubernetes.io/part-of: {{ $root.Chart.Name }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "shardmesh.labels" -}}
{{- $root := index . 0 -}}
{{ include "shardmesh.podLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{/*
metadata of a resource. Call: include "shardmesh.metadata" (list . COMPONENT NAME), where NAME is a component's name too: the coordinator's
Secret is of the component "coordinator" and called RELEASE-coordinator-tls.
*/}}
{{- define "shardmesh.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "shardmesh.name" (list $root (index . 2)) }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "shardmesh.labels" (list $root (index . 1)) | nindent 2 }}
{{- end -}}

{{/*
Regular expression of the names of a component's pods. A name of more than 46 characters loses the dash before the last 5 in its pods' names, which
are cut at 63. Call: include "shardmesh.podPattern" (list . "coordinator")
*/}}
{{- define "shardmesh.podPattern" -}}
{{ include "shardmesh.name" . }}-[a-z0-9]+-?[a-z0-9]{5}
{{- end -}}

{{/* Matchers, without braces, of the series that this release's coordinators export. */}}
{{- define "shardmesh.series" -}}
{{- printf "namespace=%q,pod=~%q" .Release.Namespace (include "shardmesh.podPattern" (list . "coordinator")) -}}
{{- end -}}

{{/* Where pods listen: on all addresses of a family. */}}
{{- define "shardmesh.anyAddress" -}}{{ ternary "[::]" "0.0.0.0" .Values.ipv6 }}{{- end -}}

{{/* Ports inside the pods. The callers' Service has a port of its own, coordinator.service.port. */}}
{{- define "shardmesh.port.callers" -}}7000{{- end -}}
{{- define "shardmesh.port.rounds" -}}7001{{- end -}}
{{- define "shardmesh.port.health" -}}7008{{- end -}}
{{- define "shardmesh.port.metrics" -}}7009{{- end -}}

{{/* policy/v1 came with 1.21. The version is asked too, because `helm template` lists every API that helm itself knows. */}}
{{- define "shardmesh.disruptionApi" -}}
{{- $v1 := and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
{{- ternary "policy/v1" "policy/v1beta1" $v1 -}}
{{- end -}}

{{- define "shardmesh.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Values.image.tag | default $root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/* Names of Secrets, wherever they come from. */}}
{{- define "shardmesh.secret.coordinatorTls" -}}
{{- .Values.tls.coordinatorSecret | default (include "shardmesh.name" (list . "coordinator-tls")) -}}
{{- end -}}
{{- define "shardmesh.secret.workerTls" -}}
{{- .Values.tls.workerSecret | default (include "shardmesh.name" (list . "worker-tls")) -}}
{{- end -}}
{{- define "shardmesh.secret.callerTls" -}}
{{- .Values.tls.callerSecret | default (include "shardmesh.name" (list . "caller-tls")) -}}
{{- end -}}
{{- define "shardmesh.secret.keyHashes" -}}
{{- .Values.apiKeys.existingSecret | default (include "shardmesh.name" (list . "key-hashes")) -}}
{{- end -}}
{{/* The caller's key in plain; empty where only hashes were given. */}}
{{- define "shardmesh.secret.callerKey" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingCallerSecret -}}
{{- else -}}
{{- include "shardmesh.name" (list . "caller-key") -}}
{{- end -}}
{{- end -}}
{{- define "shardmesh.secret.hubToken" -}}
{{- if .Values.model.hubToken.existingSecret -}}
{{- .Values.model.hubToken.existingSecret -}}
{{- else if .Values.model.hubToken.value -}}
{{- include "shardmesh.name" (list . "hub-token") -}}
{{- end -}}
{{- end -}}

{{/* DNS names under which callers reach the coordinators. */}}
{{- define "shardmesh.coordinatorNames" -}}
{{- $service := include "shardmesh.name" (list . "coordinator") -}}
{{- $names := list "coordinator.shardmesh" $service -}}
{{- range list "" ".svc" (printf ".svc.%s" .Values.clusterDomain) -}}
{{- $names = append $names (printf "%s.%s%s" $service $.Release.Namespace .) -}}
{{- end -}}
{{/* localhost: through kubectl port-forward, and inside the pod */}}
{{- toJson (concat $names (list "localhost") .Values.tls.extraNames) -}}
{{- end -}}
